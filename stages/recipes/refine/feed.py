"""What is drawn for the pictures of a refinement model, and their captions.

T text tokens of a caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitdance.kinds.refine.config import RefineConfig
from bitdance.kinds.refine.noise import RefineNoise
from bitdance.networks.text_encoder import PromptReader
from stages.data.shards import Sample


@dataclass(frozen=True)
class LabelNoise:
    """See `pictures.feed.Noise`. In validation the times of the samples are spread evenly, so that they do not depend on luck."""

    shape: RefineConfig
    grid: tuple[int, int]

    def draw(self, training: bool, source: torch.Generator) -> RefineNoise:
        return RefineNoise.draw(1, self.shape, self.grid, training, source)

    def joined(self, noise: Sequence[RefineNoise]) -> RefineNoise:
        return RefineNoise.joined(noise)


@dataclass(frozen=True)
class CaptionBatch:
    """The token ids of each picture's caption; they are read one by one, so they stay lists."""

    ids: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device | str) -> "CaptionBatch":
        """Itself: ids go to the device when they are encoded."""
        return self


@dataclass(frozen=True)
class Captions:
    """See `pictures.feed.Conditions`. One of a sample's captions is drawn; a share `drop` of them is left out in training."""

    reader: PromptReader
    most: int
    drop: float

    def of(self, sample: Sample, source: torch.Generator | None) -> tuple[int, ...]:
        if not sample.captions:
            raise ValueError("it has no caption; give shards with captions, or leave refine.text_encoder out for classes")
        caption = sample.captions[0]
        if source is not None:
            caption = sample.captions[int(torch.randint(len(sample.captions), (), generator=source))]
            if float(torch.rand((), generator=source)) < self.drop:
                caption = ""
        return tuple(self.reader.ids(caption)[: self.most])

    def joined(self, conditions: Sequence[tuple[int, ...]]) -> CaptionBatch:
        return CaptionBatch(tuple(conditions))
