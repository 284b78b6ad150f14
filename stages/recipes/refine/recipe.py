"""Recipe 'refine': what the engine asks of it (see `stages/recipe.py`), put together from this folder's parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.labels import bits_of
from bitdance.kinds.refine.loop import OwnDraws, refine
from bitdance.kinds.refine.predictors import ClassPredictor, TextPredictor
from bitdance.kinds.refine.settings import choose
from lfq_tokenizer.any_tokenizer import check_makes_bits
from stages.recipes.pictures.feed import PictureFeed
from stages.recipes.pictures.prompts import PromptRecipe
from stages.recipes.pictures.recipe import PictureObjective
from stages.recipes.refine.config import RefineTraining, RefineTrainingConfig
from stages.recipes.refine.feed import LabelNoise
from stages.recipes.refine.objective import RefineObjective
from stages.recipes.refine.plan import loss_of


class RefineRecipe(PromptRecipe):
    """See `PromptRecipe`."""

    layout = LAYOUT
    training_alone = ("drop", "P_mean", "P_std", "time_shift", "grids", "grid")
    loss_of = staticmethod(loss_of)
    training: RefineTraining

    def __init__(self, config: RefineTrainingConfig) -> None:
        training = config.refine
        super().__init__(config, training)
        check_makes_bits(self.tokenizer.config, f"refine.tokenizer = {training.tokenizer!r}")
        shape = training.shape(self.tokenizer.config.bits, self.grid(), *self.classes_or_width)
        self.module: nn.Module = RefineObjective(self.network(shape), self.tokenizer, self.text)
        grid = (self.grid(), self.grid())
        noise = LabelNoise(shape, grid)
        self.feed = PictureFeed(config, training, self.data, self.conditions(shape.drop), noise, (shape.bits, *grid))
        self.flops = self.token_flops(shape)

    def generate(self, objective: PictureObjective, conditions: Sequence[Any], generators: Sequence[torch.Generator]) -> Tensor:
        """See `PictureRecipe`."""
        network, text = objective.model, objective.text.module
        predictor: ClassPredictor | TextPredictor
        if text is None:
            predictor = ClassPredictor(network, conditions)
        else:
            text.to(next(network.parameters()).device)
            predictor = TextPredictor(network, text.encode(conditions), text.encode([""] * len(conditions)))
        grid = (self.grid(), self.grid())
        draws = OwnDraws(generators, network.config, grid, predictor.by_token)
        return bits_of(refine(predictor, choose(self.defaults()), draws, len(conditions)), network.config)
