"""Recipe 'class_patch': what the engine asks of it (see `stages/recipe.py`), put together from this folder's parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.kinds.class_patch.generate import generate_bits
from bitdance.kinds.class_patch.settings import choose
from stages.recipes.class_patch.config import ClassTrainingConfig
from stages.recipes.class_patch.feed import BlockNoise
from stages.recipes.class_patch.objective import ClassPatchObjective
from stages.recipes.class_patch.plan import loss_of
from stages.recipes.pictures.feed import PictureFeed
from stages.recipes.pictures.recipe import PictureObjective, PictureRecipe


class ClassPatchRecipe(PictureRecipe):
    """See `PictureRecipe`."""

    layout = LAYOUT
    training_alone = (
        "class_dropout_prob",
        "perturb_rate",
        "diff_batch_mul",
        "P_mean",
        "P_std",
        "time_schedule",
        "time_shift",
    )
    loss_of = staticmethod(loss_of)

    def __init__(self, config: ClassTrainingConfig) -> None:
        super().__init__(config, config.class_patch)
        assert self.labels is not None
        shape = config.class_patch.shape(self.tokenizer.config, self.grid(), len(self.labels))
        network: Any = self.network(shape)
        network.checkpoint_head(self.training.checkpoint_activations)
        self.module: nn.Module = ClassPatchObjective(network, self.tokenizer)
        bits = (shape.latent_dim, shape.grid, shape.grid)
        self.feed = PictureFeed(config, self.training, self.data, self.labels, BlockNoise(shape), bits)
        self.flops = self.token_flops(shape)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Everything trains: the head, and the network that makes its conditions."""
        assert isinstance(self.module, PictureObjective)
        model = self.module.model
        head = list(model.head.parameters())
        known = {id(p) for p in head}
        return {"network": [p for p in model.parameters() if id(p) not in known], "head": head}

    def generate(self, objective: PictureObjective, conditions: Sequence[Any], generators: Sequence[torch.Generator]) -> Tensor:
        """See `PictureRecipe`."""
        return generate_bits(objective.model, conditions, choose(self.defaults()), generators)
