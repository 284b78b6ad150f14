"""Recipe 'next_scale': what the engine asks of it (see `stages/recipe.py`), put together from this folder's parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.kinds.next_scale.folder import LAYOUT
from bitdance.kinds.next_scale.generate import condition_of, generate_tokens, own_draws
from bitdance.kinds.next_scale.settings import choose
from lfq_tokenizer.scale_vae import ScaleTokenizer
from stages.recipes.next_scale.config import NextScaleTraining, NextScaleTrainingConfig
from stages.recipes.next_scale.feed import ScaleDraws, ScaleFeed
from stages.recipes.next_scale.objective import NextScaleObjective
from stages.recipes.next_scale.plan import loss_of
from stages.recipes.pictures.prompts import PromptRecipe
from stages.recipes.pictures.recipe import PictureObjective


class NextScaleRecipe(PromptRecipe):
    """See `PromptRecipe`."""

    layout = LAYOUT
    training_alone = ("drop", "drop_path", "flips", "flip_scales", "gate")
    loss_of = staticmethod(loss_of)
    training: NextScaleTraining

    def __init__(self, config: NextScaleTrainingConfig) -> None:
        training = config.next_scale
        super().__init__(config, training)
        if not isinstance(self.tokenizer, ScaleTokenizer):
            raise ValueError(
                f"next_scale.tokenizer = {training.tokenizer!r} makes {self.tokenizer.config.token}; give a tokenizer of scales: "
                "a converted one of VAR or Infinity"
            )
        shape = training.shape(self.tokenizer.config, *self.classes_or_width)
        self.module: nn.Module = NextScaleObjective(self.network(shape), self.tokenizer, self.text, training)
        grid = (shape.bits, self.grid(), self.grid())
        self.feed = ScaleFeed(config, training, self.data, self.conditions(0.0), ScaleDraws(shape), grid)
        self.flops = self.token_flops(shape)

    def generate(self, objective: PictureObjective, conditions: Sequence[Any], generators: Sequence[torch.Generator]) -> Tensor:
        """The sum of all scales, which the decoder reads (B,Z,h,w)."""
        network, text, settings = objective.model, objective.text.module, choose(self.defaults())
        device = next(network.parameters()).device
        condition = condition_of(network, None if text is None else text.to(device), conditions, settings.guided)
        quantizer, sides = self.tokenizer.to(device).quantize, network.config.sides
        return generate_tokens(network, quantizer, condition, sides, settings, own_draws(generators), len(conditions)).total

    def decode(self, total_BZhw: Tensor) -> Tensor:
        """See `PictureRecipe`."""
        return self.tokenizer.decode_sum(total_BZhw)
