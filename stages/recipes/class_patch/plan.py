"""What `--dry-run` says of a class-conditional model: its network, and the loss that is counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig
from stages.recipes.class_patch.config import ClassPatchTraining
from stages.recipes.pictures.plan import PictureSubject


class ClassPatchSubject(PictureSubject):
    """See `pictures.plan.Subject`."""

    training: ClassPatchTraining

    def shape(self, tokenizer: PictureTokenizerConfig, classes: Callable[[], int]) -> ClassPatchConfig:
        return self.training.shape(tokenizer, self.grid(tokenizer), classes())

    def build(self, shape: ClassPatchConfig) -> ClassPatchModel:
        model = ClassPatchModel(shape)
        model.checkpoint_layers = self.training.checkpoint_activations
        model.checkpoint_head(self.training.checkpoint_activations)
        return model

    def parts(self, network: ClassPatchModel) -> dict[str, Any]:
        return {"head": network.head}

    def loss_of(self, network: ClassPatchModel, B: int) -> Tensor:
        return loss_of(network, B)

    def about(self, shape: ClassPatchConfig) -> str:
        step = shape.parallel_num
        return (
            f"{shape.num_classes:,} classes, pictures of {shape.num_tokens:,} tokens of {shape.token}, "
            f"{step} token{'s' * (step > 1)} per step"
        )


def loss_of(network: ClassPatchModel, B: int) -> Tensor:
    """The training loss of so many pictures of nothing, for counting."""
    c = network.config
    bits_BChw = torch.ones(B, c.latent_dim, c.grid, c.grid)
    losses = network.losses(bits_BChw, torch.zeros(B, dtype=torch.long), ClassNoise.draw(B, c, True))
    return losses["bits"].mean()
