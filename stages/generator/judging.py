"""Losses on held-out samples, under draws that never change."""

import torch

from stages.data.mixture import Mixture
from stages.generator.documents import Documents, slot_generator
from stages.generator.objective import GeneratorObjective, accuracy

JUDGED = 256  # samples
BATCH = 32


@torch.no_grad()
def heldout_losses(
    objective: GeneratorObjective, documents: Documents, heldout: Mixture, judged: int = JUDGED
) -> dict[str, float]:
    """Of up to `judged` samples with their first caption and without flips: `vision`, `text`, `bit_accuracy`, and `vision` by
    resolution where there are several."""
    device = objective.model.backbone.device
    places = [heldout.at(slot) for slot in range(min(judged, len(heldout)))]
    values: dict[str, list[torch.Tensor]] = {}
    for resolution in sorted({place.resolution for place in places}):
        members = [(slot, place) for slot, place in enumerate(places) if place.resolution == resolution]
        for start in range(0, len(members), BATCH):
            drawn = [
                documents.plain(heldout.sources[0].data, place, slot_generator(0, slot))
                for slot, place in members[start : start + BATCH]
            ]
            losses = objective.losses(documents.batch(drawn).to(device))
            values.setdefault("vision", []).append(losses.vision_rows.flatten())
            values.setdefault("text", []).append(losses.text_rows)
            values.setdefault("bit_accuracy", []).append(accuracy(losses)["bit_accuracy"][None])
            if resolution:
                values.setdefault(f"vision/{resolution}", []).append(losses.vision_rows.flatten())
    means = torch.stack([torch.cat(parts).mean() for parts in values.values()])
    return dict(zip(values, means.tolist(), strict=True))  # the one time that the host waits for the device
