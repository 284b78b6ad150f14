"""A network that a loss uses and that does not train with it."""

import copy
from typing import Any

from torch import nn


class Held:
    """Keeps `module` out of its owner's parameters, checkpoints and running average; copies of the owner share it."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module: Any = module

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        return copy.copy(self)
