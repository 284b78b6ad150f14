"""What is drawn for the pictures of a class-conditional model, and their classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.noise import ClassNoise


@dataclass(frozen=True)
class BlockNoise:
    """See `pictures.feed.Noise`."""

    shape: ClassPatchConfig

    def draw(self, training: bool, source: torch.Generator) -> ClassNoise:
        return ClassNoise.draw(1, self.shape, training, source)

    def joined(self, noise: Sequence[ClassNoise]) -> ClassNoise:
        return ClassNoise.joined(noise, self.shape)
