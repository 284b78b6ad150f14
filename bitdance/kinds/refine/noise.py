"""The random numbers of a training step: they belong to the pictures and not to the network.

B pictures, G labels per token, V values of a label, h w token grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitdance.kinds.refine.config import RefineConfig


@dataclass(frozen=True)
class RefineNoise:
    """`time_B` nominal shares of kept labels, `kept_BGhw` which are kept, `random_BGhw` what stands in place of the others;
    `dropped_B` pictures whose condition is left out, None: none of them."""

    time_B: Tensor
    random_BGhw: Tensor
    kept_BGhw: Tensor
    dropped_B: Tensor | None = None

    @classmethod
    def draw(
        cls, B: int, config: RefineConfig, grid: tuple[int, int], training: bool, generator: torch.Generator | None = None
    ) -> "RefineNoise":
        """For B pictures, in the published order: dropped conditions (in training only), times, labels, which are kept."""
        dropped = torch.rand(B, generator=generator) < config.drop if training and config.drop > 0 else None
        drawn = torch.randn(B, generator=generator) if config.P_std > 0 else torch.rand(B, generator=generator)
        time_B = times(drawn, config)
        shape = (B, config.label_count, *grid)
        random_BGhw = torch.randint(0, config.values, shape, generator=generator)
        return cls(time_B, random_BGhw, torch.rand(shape, generator=generator) < time_B[:, None, None, None], dropped)

    @classmethod
    def joined(cls, noise: Sequence["RefineNoise"]) -> "RefineNoise":
        """Those of several batches as those of one; either all of them drop, or none does."""
        dropped = [one.dropped_B for one in noise if one.dropped_B is not None]
        time_B, random_BGhw, kept_BGhw = (
            torch.cat([getattr(one, name) for one in noise]) for name in ("time_B", "random_BGhw", "kept_BGhw")
        )
        return cls(time_B, random_BGhw, kept_BGhw, torch.cat(dropped) if dropped else None)

    def to(self, device: torch.device | str) -> "RefineNoise":
        """The same on a device."""
        dropped = None if self.dropped_B is None else self.dropped_B.to(device)
        return RefineNoise(self.time_B.to(device), self.random_BGhw.to(device), self.kept_BGhw.to(device), dropped)

    def corrupted(self, labels_BGhw: Tensor) -> Tensor:
        """The labels as the network sees them."""
        return torch.where(self.kept_BGhw, labels_BGhw, self.random_BGhw)


def times(drawn_B: Tensor, config: RefineConfig) -> Tensor:
    """Standard normal (or, where P_std is 0, uniform) draws → shares of kept labels; a shift above 1 makes them smaller."""
    time_B = torch.sigmoid(drawn_B * config.P_std + config.P_mean) if config.P_std > 0 else drawn_B
    return 1 - shifted(1 - time_B, config.time_shift)


def shifted(noise: Any, shift: float) -> Any:
    """A share of noise (a number or a tensor), made larger by a shift above 1: shift·s / (1 + (shift - 1)·s)."""
    return shift * noise / (1 + (shift - 1) * noise)
