"""What a step of a class-conditional model computes: batch → loss of the head's velocity, or cross-entropy of its bits.

Source: BitDance paper (arXiv 2602.14041), ImageNet models.
"""

import torch

from stages.recipe import Losses
from stages.recipes.generator.objective import by_noise_level
from stages.recipes.pictures.feed import PictureBatch
from stages.recipes.pictures.recipe import PictureObjective


class ClassPatchObjective(PictureObjective):
    """See `PictureObjective`."""

    loss_name = "velocity"

    def rows(self, batch: PictureBatch) -> torch.Tensor:
        """The loss before the mean (K,P): K blocks, all of them once per noise draw."""
        return self.model.losses(batch.encoded(self.tokenizer.module), batch.condition, batch.noise)["bits"]

    def forward(self, batch: PictureBatch, generator: torch.Generator, step: int) -> Losses:
        loss_KP = self.rows(batch)
        diffusion = self.model.config.head_kind == "diffusion"
        return loss_KP.mean(), by_noise_level("velocity", loss_KP, batch.noise.time_K) if diffusion else {}, None
