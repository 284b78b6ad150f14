"""What the engine asks of a recipe. A recipe knows the model and the data; the engine knows neither."""

from dataclasses import dataclass, field
from importlib import import_module
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


@dataclass
class Micro:
    """What one process computes in one micro-step. Made by a loader process, so it holds nothing that cannot be sent."""

    batch: Any  # on the CPU, with .to(device)
    samples: list[str]  # their names, for messages
    skipped: dict[str, int] = field(default_factory=dict)  # samples that could not be read and were replaced, by reason
    tokens: int = 0  # of the sequence, without padding; 0 where there is no sequence
    positions: int = 0  # with padding
    named: dict[str, str] = field(default_factory=dict)  # the samples that were replaced → why


class Recipe(Protocol):
    """One per kind of model; see `tokenizer/recipe.py` and `generator/recipe.py`.

    `module` holds every weight that trains and nothing else that must be saved; `module(batch, generator, step)` returns the
    loss, further scalars to log, and what the opponent judges.

    The samples of a run stand in one endless row. `batch(slots, generator)` makes the part `slots` of it: a pure function of its
    arguments, called in loader processes. What is random about one sample should depend on its slot, so that it does not
    change with the number of processes; the generator serves what is random about a batch.

    `validate` is called on every process, `sample` and `save_model` on the first alone; all of them with whole, averaged weights.
    """

    module: nn.Module
    opponent: Opponent | None
    length: int  # training samples
    hash: str  # identity of the data, so that a resumed run notices other shards
    flops: float  # of one token, forward and backward, for the share of the machine's peak; 0 where unknown

    def parts(self) -> dict[str, list[nn.Parameter]]: ...  # what `optimizer.scale` can name; together all that trains

    def batch(self, slots: range, generator: torch.Generator) -> Micro: ...

    def validate(self, module: nn.Module) -> dict[str, float]: ...

    def sample(self, module: nn.Module) -> Image.Image: ...

    def save_model(self, module: nn.Module, folder: Path, step: int) -> None: ...  # after so many steps


Losses = tuple[Tensor, dict[str, Tensor], Tensor | None]  # loss, scalars, what the opponent judges


# The package of a recipe. It offers `build_recipe(config)`, what the engine trains, and `plan_run(config, arguments)`, the plan
# as JSON values and as text.
RECIPES = {"tokenizer": "stages.tokenizer", "generator": "stages.generator", "class_patch": "stages.class_patch"}


def package_of(config: TrainingConfig) -> Any:
    """The package of the recipe that `config.recipe` names."""
    return import_module(RECIPES[config.recipe])


def build_recipe(config: TrainingConfig) -> Recipe:
    """The recipe that `config.recipe` names."""
    made: Recipe = package_of(config).build_recipe(config)
    return made
