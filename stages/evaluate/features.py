"""Networks that look at pictures: the user's Inception weights, EfficientNet-Lite0, the user's CLIP."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from stages.evaluate.samples import Pictures
from stages.measure.frechet import inception_network, lite0_features

CLIP_BATCH = 16
SPATIAL = 7  # channels of the 17×17 map that sFID looks at


@dataclass(frozen=True)
class Seen:
    """What a network saw in N pictures: `pool_NF`; of Inception also `spatial_NF` (2023 numbers, for sFID) and `logits_NC`
    (without bias, for the inception score)."""

    pool_NF: Tensor
    spatial_NF: Tensor | None = None
    logits_NC: Tensor | None = None


@dataclass(frozen=True)
class Looker:
    """`name` as it stands beside a figure; `look`: uint8 (B,3,H,W) → `Seen`."""

    name: str
    look: Callable[[Tensor], Seen]

    @torch.no_grad()
    def all(self, pictures: Pictures, what: str) -> Seen:
        """Of all pictures."""
        parts = [self.look(batch) for batch in tqdm(pictures.batches(), disable=None, desc=what, unit="batch")]
        joined = [
            None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
            for name in ("pool_NF", "spatial_NF", "logits_NC")
        ]
        assert joined[0] is not None
        return Seen(joined[0], joined[1], joined[2])


def lite0() -> Looker:
    """The 1280 features of EfficientNet-Lite0, of a package that carries its weights."""
    network = lite0_features().network.eval()
    return Looker("EfficientNet-Lite0, 1280", lambda levels: Seen(network(levels).float()))


def inception(weights: Path) -> Looker:
    """torch-fidelity's Inception with the user's copy of its weights; see `frechet.inception_network`."""
    return looker_of(inception_network(weights, ("2048", "logits_unbiased")))


def looker_of(network: nn.Module) -> Looker:
    """`network._torch_fidelity_forward(levels)` gives pool (B,2048) and logits (B,1008); its `Mixed_6d.branch1x1` the map that
    ADM calls mixed_6/conv, of which sFID takes the first seven channels."""
    held: list[Tensor] = []
    network.eval()
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: held.append(out))

    def look(levels: Tensor) -> Seen:
        held.clear()
        pool, logits = network._torch_fidelity_forward(levels)
        spatial = held[0][:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        return Seen(pool.flatten(1).float(), spatial.float(), logits.float())

    return Looker("Inception (torch-fidelity's port), 2048", look)


def clip_scores(folder: Path, pictures: Iterable[Image.Image], prompts: Iterable[str]) -> list[float]:
    """max(0, 100·cosine) of each picture and its prompt, by the CLIP of a folder as transformers keeps it; a few pictures are
    taken at a time."""
    from transformers import AutoProcessor, CLIPModel

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no CLIP; give a folder as transformers keeps it")
    model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found: list[float] = []
    pairs = iter(tqdm(zip(pictures, prompts, strict=True), disable=None, desc="CLIP", unit="picture"))
    with torch.no_grad():
        while part := list(islice(pairs, CLIP_BATCH)):
            images, texts = (list(side) for side in zip(*part, strict=True))
            given = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
            out = model(**given)
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            found += (100 * cosine).clamp_min(0).tolist()
    return found
