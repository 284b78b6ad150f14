"""Recipe 'refine': what the engine asks of it (see `stages/recipe.py`), put together from this folder's parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.kinds.refine.config import RefineConfig
from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.labels import bits_of
from bitdance.kinds.refine.loop import OwnDraws, refine
from bitdance.kinds.refine.predictors import ClassPredictor, TextPredictor
from bitdance.kinds.refine.settings import choose
from bitdance.networks.text_encoder import TextEncoder
from stages.engine.checkpoint import model_folder
from stages.recipes.pictures.feed import Conditions, PictureFeed
from stages.recipes.pictures.recipe import PER_CLASS, PictureObjective, PictureRecipe
from stages.recipes.refine.config import RefineTraining, RefineTrainingConfig
from stages.recipes.refine.feed import Captions, LabelNoise
from stages.recipes.refine.objective import RefineObjective
from stages.recipes.refine.plan import loss_of


class RefineRecipe(PictureRecipe):
    """See `PictureRecipe`."""

    layout = LAYOUT
    training_alone = ("drop", "P_mean", "P_std", "time_shift", "grids", "grid")
    loss_of = staticmethod(loss_of)
    training: RefineTraining

    def __init__(self, config: RefineTrainingConfig) -> None:
        training = config.refine
        super().__init__(config, training, captions=bool(training.text_encoder))
        text = None
        if training.text_encoder:
            text = TextEncoder.from_pretrained(model_folder(training.text_encoder), torch.float32, training.prompt_prefix)
        shape = self._shape(text)
        network: Any = self.network(shape)
        network.checkpoint_layers = training.checkpoint_activations
        if config.run.compile:
            network.compile()
        self.module: nn.Module = RefineObjective(network, self.tokenizer, text)
        grid = (self.grid(), self.grid())
        conditions: Conditions
        if text is None:
            assert self.labels is not None
            conditions = self.labels
        else:
            conditions = Captions(text.reader, training.max_text_tokens, shape.drop)
        self.feed = PictureFeed(config, training, self.data, conditions, LabelNoise(shape, grid), (shape.bits, *grid))
        self.flops = self.token_flops(shape)

    def _shape(self, text: TextEncoder | None) -> RefineConfig:
        if text is not None:
            return self.training.shape(self.tokenizer.config.bits, self.grid(), None, text.width)
        assert self.labels is not None
        return self.training.shape(self.tokenizer.config.bits, self.grid(), len(self.labels))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """One part, which trains."""
        assert isinstance(self.module, PictureObjective)
        return {"network": list(self.module.model.parameters())}

    def sample_conditions(self) -> list[Any]:
        """See `PictureRecipe`; of a model of prompts the ones that the config names."""
        if not self.training.text_encoder:
            return super().sample_conditions()
        prompts = self.training.sample_prompts or ("",)
        return [prompt for prompt in prompts for _ in range(PER_CLASS)]

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
