"""What is drawn for the pictures of a refinement model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitdance.kinds.refine.config import RefineConfig
from bitdance.kinds.refine.noise import RefineNoise


@dataclass(frozen=True)
class LabelNoise:
    """See `pictures.feed.Noise`. In validation the times of the samples are spread evenly, so that they do not depend on luck."""

    shape: RefineConfig
    grid: tuple[int, int]

    def draw(self, training: bool, source: torch.Generator) -> RefineNoise:
        return RefineNoise.draw(1, self.shape, self.grid, training, source)

    def joined(self, noise: Sequence[RefineNoise]) -> RefineNoise:
        return RefineNoise.joined(noise)
