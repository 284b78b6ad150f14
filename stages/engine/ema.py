"""AdamW, with Muon for the matrices where that is asked for, and the exponential moving average of the weights it trains.

The average is one more state of the optimiser, beside the moments, so it is partitioned and offloaded wherever they are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from stages.engine import muon

EXCHANGED = 2**24  # numbers that are swapped at a time, so that hardly any memory is needed


class AveragedAdamW(torch.optim.AdamW):
    """`average ← d·average + (1 − d)·weight` after every step of a weight; d = min(`decay`, (1 + n) / (10 + n)) in its step n.

    The warm-up of d keeps a short run from being dominated by its initial weights. With `decay` 0 there is no average. Groups
    with `muon` true learn by Muon and have no second moment.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: Iterable[dict[str, Any]], decay: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None] if self.decay else []
        first = {p: p.detach().clone() for p in trained if "average" not in self.state.get(p, {})}
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        result = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._muon(group)
        for p in trained:
            state = self.state[p]
            n = state["step"]
            state.setdefault("average", first.get(p)).lerp_(p, 1 - torch.clamp((1 + n) / (10 + n), max=self.decay))
        return result

    def _muon(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        for p in weights:
            state = self.state[p] or self.prepare(p, torch.zeros(()))
            state["step"] += 1
        muon.step(weights, [self.state[p]["exp_avg"] for p in weights], group["lr"], group["weight_decay"])

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap every weight with its average, in place. A second call restores both, bit for bit."""
        for weight, state in self.state.items():
            if "average" in state:
                for w, a in zip(weight.split(EXCHANGED), state["average"].split(EXCHANGED), strict=True):
                    kept = w.clone()
                    w.copy_(a)
                    a.copy_(kept)

    def prepare(self, weight: Tensor, step: Tensor) -> dict[str, Tensor]:
        """The state of a weight that has been trained for `step` steps, for the caller to fill in."""
        by_muon = any(weight is p for group in self.param_groups if group.get("muon") for p in group["params"])
        state = {name: torch.zeros_like(weight) for name in (("exp_avg",) if by_muon else ("exp_avg", "exp_avg_sq"))}
        state["step"] = step.to(device=weight.device, dtype=torch.float32)
        if self.decay:
            state["average"] = weight.detach().clone()
        self.state[weight] = state
        return state
