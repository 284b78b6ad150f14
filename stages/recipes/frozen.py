"""A network that a loss uses and that does not train with it."""

import copy
from typing import Any


class Frozen:
    """Keeps `module`, a network or what holds one, out of its owner's parameters, checkpoints and running average.

    Copies of the owner share it.
    """

    def __init__(self, module: Any) -> None:
        self.module: Any = module

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return copy.copy(self)
