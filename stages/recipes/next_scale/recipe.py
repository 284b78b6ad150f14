"""Recipe 'next_scale': what the engine asks of it (see `stages/recipe.py`), put together from this folder's parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.kinds.next_scale.folder import LAYOUT
from bitdance.kinds.next_scale.generate import generate_tokens, own_draws
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
        classes, width = None if self.labels is None else len(self.labels), None if self.text is None else self.text.width
        shape = training.shape(self.tokenizer.config, classes, width)
        network: Any = self.network(shape)
        network.checkpoint_layers = training.checkpoint_activations
        if config.run.compile:
            network.compile()
        self.module: nn.Module = NextScaleObjective(network, self.tokenizer, self.text, training)
        grid = (shape.bits, self.grid(), self.grid())
        self.feed = ScaleFeed(config, training, self.data, self.conditions(0.0), ScaleDraws(shape), grid)
        self.flops = self.token_flops(shape)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One part, which trains."""
        assert isinstance(self.module, PictureObjective)
        return {"network": list(self.module.model.parameters())}

    def generate(self, objective: PictureObjective, conditions: Sequence[Any], generators: Sequence[torch.Generator]) -> Tensor:
        """The sum of all scales, which the decoder reads (B,Z,h,w)."""
        network, text, settings = objective.model, objective.text.module, choose(self.defaults())
        device = next(network.parameters()).device
        if text is None:
            rows = [*conditions, *[network.null_class] * len(conditions)] if settings.guided else list(conditions)
            condition = network.of_classes(torch.tensor(rows, device=device))
        else:
            features = [one.to(device) for one in text.to(device).encode(conditions)]
            against = [network.cfg_uncond[: len(one)] for one in features]
            condition = network.of_text([*features, *against] if settings.guided else features)
        quantizer, sides = self.tokenizer.to(device).quantize, network.config.sides
        return generate_tokens(network, quantizer, condition, sides, settings, own_draws(generators), len(conditions)).total

    def decode(self, total_BZhw: Tensor) -> Tensor:
        """See `PictureRecipe`."""
        return self.tokenizer.decode_sum(total_BZhw)
