"""The losses on held-out samples, under noise that never changes."""

from collections.abc import Iterator

import torch

from stages.data.mixture import Mixture
from stages.feed import sample_generator
from stages.recipes.generator.documents import Documents, Example
from stages.recipes.generator.objective import GeneratorObjective, accuracy

SAMPLES = 256
BATCH = 32


def heldout_examples(documents: Documents, heldout: Mixture, count: int = SAMPLES) -> Iterator[tuple[int, list[Example]]]:
    """Up to `count` samples with their first caption, no bit flipped and noise that never changes, some of one resolution at a
    time."""
    references = [heldout.at(index) for index in range(min(count, len(heldout)))]
    for resolution in sorted({reference.resolution for reference in references}):
        members = [(index, r) for index, r in enumerate(references) if r.resolution == resolution]
        for start in range(0, len(members), BATCH):
            yield (
                resolution,
                [
                    documents.plain(heldout.sources[0].data, reference, sample_generator(0, index))
                    for index, reference in members[start : start + BATCH]
                ],
            )


@torch.no_grad()
def heldout_losses(
    objective: GeneratorObjective, documents: Documents, heldout: Mixture, count: int = SAMPLES
) -> dict[str, float]:
    """The mean losses of up to `count` samples with their first caption and no bit flipped: `vision`, `text`, `bit_accuracy`,
    and `vision` by resolution where there are several."""
    device = objective.model.backbone.device
    values: dict[str, list[torch.Tensor]] = {}
    for resolution, examples in heldout_examples(documents, heldout, count):
        losses = objective.losses(documents.batch(examples).to(device))
        values.setdefault("vision", []).append(losses.vision_rows.flatten())
        values.setdefault("text", []).append(losses.text_rows)
        values.setdefault("bit_accuracy", []).append(accuracy(losses)["bit_accuracy"][None])
        if resolution:
            values.setdefault(f"vision/{resolution}", []).append(losses.vision_rows.flatten())
    means = torch.stack([torch.cat(parts).mean() for parts in values.values()])
    return dict(zip(values, means.tolist(), strict=True))  # the one time that the host waits for the device
