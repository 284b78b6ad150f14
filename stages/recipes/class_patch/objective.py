"""What a step of a class-conditional model computes: batch → loss of the head's velocity.

Source: BitDance paper (arXiv 2602.14041), ImageNet models.
"""

import torch
from torch import nn

from bitdance.kinds.class_patch.model import ClassPatchModel
from lfq_tokenizer import LFQTokenizer
from stages.recipe import Losses
from stages.recipes.class_patch.feed import ClassBatch
from stages.recipes.frozen import Frozen
from stages.recipes.generator.objective import by_noise_level


class ClassPatchObjective(nn.Module):
    """The tokenizer is frozen: it is no part of what trains and is not saved with the resume state."""

    def __init__(self, model: ClassPatchModel, tokenizer: LFQTokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = Frozen(tokenizer)

    def rows(self, batch: ClassBatch) -> torch.Tensor:
        """The loss before the mean (K,P): K blocks, all of them once per noise draw."""
        tokenizer: LFQTokenizer = self.tokenizer.module.to(batch.class_B.device)
        return self.model.losses(batch.encoded(tokenizer), batch.class_B, batch.noise)["bits"]

    def forward(self, batch: ClassBatch, generator: torch.Generator, step: int) -> Losses:
        loss_KP = self.rows(batch)
        return loss_KP.mean(), by_noise_level("velocity", loss_KP, batch.noise.time_K), None
