"""What the engine asks of a recipe. A recipe knows the model and the data; the engine knows neither."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from stages.config import OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class Opponent:
    """A second network with an optimiser of its own, which takes its step after the module's, from step `start` on.

    `module(batch, made)` returns its loss and scalars; `made` is what the recipe's module returned.
    """

    module: nn.Module
    optimizer: OptimizerConfig
    start: int


class Recipe(Protocol):
    """One per kind of model; see `tokenizer/recipe.py` and `generator_recipe.py`.

    `module` holds every weight that trains and nothing else that must be saved; `module(batch, generator, step)` returns the
    loss, further scalars to log, and what the opponent judges. Everything random in a step comes from the generator that the
    engine passes.
    """

    module: nn.Module
    opponent: Opponent | None
    length: int  # training samples
    hash: str  # identity of the data, so that a resumed run notices other shards

    @property
    def skipped(self) -> int: ...  # samples that could not be read so far

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> Any: ...  # on the CPU, with .to(device)

    def describe(self, indices: Sequence[int]) -> list[str]: ...

    def validate(self, module: nn.Module) -> dict[str, float]: ...

    def sample(self, module: nn.Module) -> Image.Image: ...

    def save_model(self, module: nn.Module, folder: Path) -> None: ...


Losses = tuple[Tensor, dict[str, Tensor], Tensor | None]  # loss, scalars, what the opponent judges


def build_recipe(config: TrainingConfig) -> Recipe:
    """The recipe that `config.recipe` names."""
    if config.recipe == "tokenizer":
        from stages.tokenizer.recipe import TokenizerRecipe

        return TokenizerRecipe(config)
    from stages.generator_recipe import GeneratorRecipe

    return GeneratorRecipe(config)
