"""Floating point operations of such a network, counted by torch on tensors without memory."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def picture_flops(build: Callable[[], Any], loss_of: Callable[[Any, int], Tensor]) -> float:
    """Of one picture in training, forward and backward; recomputation is not in them."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        loss_of(build(), 1).backward()
    return float(counter.get_total_flops())
