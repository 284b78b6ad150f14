"""What `--dry-run` says of a next-scale model: its network, and the loss that is counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdance.kinds.next_scale.config import NextScaleConfig
from bitdance.kinds.next_scale.model import scale_losses
from bitdance.kinds.next_scale.network import NextScaleNetwork
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig
from lfq_tokenizer.scale_vae import ScaleConfig
from stages.config import TrainingConfig
from stages.recipes.next_scale.config import NextScaleTraining
from stages.recipes.pictures.plan import PictureSubject

TEXT_TOKENS = 24  # of a caption, for counting


class NextScaleSubject(PictureSubject):
    """See `pictures.plan.Subject`."""

    training: NextScaleTraining

    def tokenizer(self, config: TrainingConfig) -> tuple[PictureTokenizerConfig, str]:
        try:
            return ScaleConfig.from_published({"scales": dict(self.training.vae)}), "next_scale.vae"
        except ValueError as error:
            raise ValueError(f"next_scale.vae, for a plan without the tokenizer: {error}") from None

    def shape(self, tokenizer: PictureTokenizerConfig, classes: Callable[[], int]) -> NextScaleConfig:
        if not isinstance(tokenizer, ScaleConfig):
            raise ValueError(f"next_scale.tokenizer makes {tokenizer.token}; give a tokenizer of scales")
        return self.training.shape(tokenizer, *self.classes_or_width(classes))

    def build(self, shape: NextScaleConfig) -> NextScaleNetwork:
        network = NextScaleNetwork(shape)
        network.checkpoint_layers = self.training.checkpoint_activations
        return network

    def parts(self, network: NextScaleNetwork) -> dict[str, Any]:
        return {"network": network}

    def loss_of(self, network: NextScaleNetwork, B: int) -> Tensor:
        return loss_of(network, B)

    def about(self, shape: NextScaleConfig) -> str:
        of = "prompts" if shape.class_count is None else f"{shape.class_count:,} classes"
        return f"{of}, pictures of {shape.length:,} tokens in {len(shape.sides)} scales: {shape.token}"


def loss_of(network: NextScaleNetwork, B: int) -> Tensor:
    """The training loss of so many pictures of nothing, for counting."""
    c = network.config
    inputs = [torch.zeros(B, c.latents, h, w) for h, w in c.sides[1:]]
    if c.tokens == "codes":
        targets = [torch.zeros(B, h, w, dtype=torch.long) for h, w in c.sides]
    else:
        targets = [torch.ones(B, c.latents, h, w) for h, w in c.sides]
    if c.text_width is None:
        condition = network.of_classes(torch.zeros(B, dtype=torch.long))
    else:
        condition = network.of_text([torch.zeros(TEXT_TOKENS, c.text_width)] * B)
    return scale_losses(network, targets, inputs, condition, c.sides).mean()
