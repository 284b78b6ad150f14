"""Exponential moving average of the trained weights."""

import copy

import torch
from torch import nn


class Average:
    """A second module whose parameters follow `average ← decay·average + (1 − decay)·weight`.

    The decay warms up as (1 + n) / (10 + n) so that a short run is not dominated by its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """`step` counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours = list(self.module.parameters())
        theirs = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)
