"""What `--dry-run` says of a class-conditional model: its network, and the loss that is counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from stages.recipes.class_patch.config import ClassPatchTraining


class ClassPatchSubject:
    """See `pictures.plan.Subject`."""

    def __init__(self, training: ClassPatchTraining) -> None:
        self.training = training

    def shape(self, bits: int, grid: int, classes: Callable[[], int]) -> ClassPatchConfig:
        return self.training.shape(bits, grid, classes())

    def build(self, shape: ClassPatchConfig) -> ClassPatchModel:
        model = ClassPatchModel(shape)
        model.checkpoint_layers = model.head.net.grad_checkpointing = self.training.checkpoint_activations
        return model

    def parts(self, network: ClassPatchModel) -> dict[str, Any]:
        return {"head": network.head}

    def loss_of(self, network: ClassPatchModel, B: int) -> Tensor:
        return loss_of(network, B)

    def about(self, shape: ClassPatchConfig) -> str:
        step = shape.parallel_num
        return (
            f"{shape.num_classes:,} classes, pictures of {shape.num_tokens:,} tokens of {shape.latent_dim} bits, "
            f"{step} token{'s' * (step > 1)} per step"
        )


def loss_of(network: ClassPatchModel, B: int) -> Tensor:
    """The training loss of so many pictures of nothing, for counting."""
    c = network.config
    bits_BChw = torch.ones(B, c.latent_dim, c.grid, c.grid)
    losses = network.losses(bits_BChw, torch.zeros(B, dtype=torch.long), ClassNoise.draw(B, c, True))
    return losses["bits"].mean()
