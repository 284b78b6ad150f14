"""The endless row of samples: a fresh permutation every epoch, one after the other."""

import hashlib
from collections import OrderedDict

import torch


class EpochOrder:
    """Which of `length` samples stands at a place of the row: a pure function of the seed.

    Within an epoch every sample comes exactly once.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1 or seed < 0:
            raise ValueError(f"length {length} and seed {seed} must be positive")
        self.length, self.seed = length, seed
        self._permutations: OrderedDict[int, torch.Tensor] = OrderedDict()

    def at(self, place: int) -> int:
        """The sample at `place`, counted from 0."""
        return int(self._permutation(place // self.length)[place % self.length])

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:
                self._permutations.popitem(last=False)
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._permutations[epoch] = torch.randperm(self.length, generator=generator)
        return self._permutations[epoch]
