"""What the engine asks of a recipe. A recipe knows the model and the data; the engine knows neither."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from stages.config import OptimizerConfig, TrainingConfig
from stages.feed import Feed


@dataclass(frozen=True)
class Discriminator:
    """A second network with an optimiser of its own, which takes its step after the module's, from step `start` on.

    `module(batch, made)` returns its loss and scalars; `made` is what the recipe's module returned.
    """

    module: nn.Module
    optimizer: OptimizerConfig
    start: int


class Recipe(Protocol):
    """One per kind of model: what learns (`module`) and what it learns from (`feed`).

    `module` holds every weight that trains and nothing else that must be saved; `module(batch, generator, step)` returns the
    loss, further scalars to log, and what the discriminator judges.

    `validate` is called on every process, `sample` and `save_model` on the first alone; all of them with whole, averaged weights.
    """

    module: nn.Module
    discriminator: Discriminator | None
    flops: float  # of one token, forward and backward, for the share of the machine's peak; 0 where unknown
    base: str  # fingerprint of the model whose frozen weights are read anew instead of saved; "" where there is none

    @property
    def feed(self) -> Feed: ...

    def parts(self) -> dict[str, list[nn.Parameter]]: ...  # what `optimizer.scale` can name; together all that trains

    def validate(self, module: nn.Module) -> dict[str, float]: ...

    def sample(self, module: nn.Module) -> Image.Image: ...

    def save_model(self, module: nn.Module, folder: Path, step: int) -> None: ...  # after so many steps


Losses = tuple[Tensor, dict[str, Tensor], Tensor | None]  # loss, scalars, what the discriminator judges


# The package of a recipe. It offers `build_recipe(config)`, what the engine trains, and `plan_run(config, arguments)`, the plan
# as JSON values and as text.
RECIPES = {
    "tokenizer": "stages.recipes.tokenizer",
    "generator": "stages.recipes.generator",
    "class_patch": "stages.recipes.class_patch",
    "refine": "stages.recipes.refine",
    "next_scale": "stages.recipes.next_scale",
}


def package_of(config: TrainingConfig) -> Any:
    """The package of the recipe that `config.recipe` names."""
    return import_module(RECIPES[config.recipe])


def build_recipe(config: TrainingConfig) -> Recipe:
    """The recipe that `config.recipe` names."""
    made: Recipe = package_of(config).build_recipe(config)
    return made
