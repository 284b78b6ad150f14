"""The path between noise and data, velocity ⇄ data, and how times are drawn.

x_t = t·x + (1 - t)·e, data at t = 1, noise at t = 0. Letters: x data, e noise, x_hat the predicted data. `t` is a float
or a tensor that broadcasts against x. Source: BitDance paper (arXiv 2602.14041), binary diffusion head; published
checkpoints.
"""

from typing import TypeVar

import torch
from torch import Tensor

CLAMP = 0.05  # 1 - t is never taken below this in a velocity, neither in the loss nor in the sampler
SCHEDULES = ("logit_normal", "uniform")
Time = TypeVar("Time", Tensor, float)


def interpolate(x: Tensor, e: Tensor, t: Tensor | float) -> Tensor:
    """The point x_t on the straight path from noise e (t = 0) to data x (t = 1)."""
    return t * x + (1 - t) * e


def velocity_from_x(x_hat: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """(x_hat - x_t) / max(1 - t, 0.05): the velocity that leads from x_t to x_hat. Inverse of `x_from_velocity`."""
    return (x_hat - x_t) / _remaining(t)


def x_from_velocity(v: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """x_t + max(1 - t, 0.05)·v: the data a velocity leads to. Inverse of `velocity_from_x`."""
    return x_t + _remaining(t) * v


def shift_time(t: Time, shift: float) -> Time:
    """(1/a) / (1/a + (1/t - 1)) for shift a > 0, written without a division by t. Keeps 0 and 1; a > 1 favours
    noise."""
    return t / (t + shift * (1 - t))


def warp_time(draw_K: Tensor, schedule: str, mean: float, std: float, shift: float) -> Tensor:
    """Raw draws → times in (0, 1): sigmoid(mean + std·n) for "logit_normal", the draw itself for "uniform"; then the
    shift."""
    t_K = torch.sigmoid(mean + std * draw_K) if schedule == "logit_normal" else draw_K
    return t_K if shift == 1.0 else shift_time(t_K, shift)


def draw_time(rows: int, schedule: str, mean: float, std: float, shift: float, generator: torch.Generator | None) -> Tensor:
    """One training time per row, (rows,) float32 on the generator's device: `randn` or, for "uniform", `rand`."""
    if schedule not in SCHEDULES:
        raise ValueError(f"time_schedule = {schedule!r}; allowed are {', '.join(SCHEDULES)}")
    draw = torch.randn if schedule == "logit_normal" else torch.rand
    device = generator.device if generator is not None else None
    return warp_time(draw(rows, generator=generator, device=device), schedule, mean, std, shift)


def _remaining(t: Tensor | float) -> Tensor | float:
    return (1 - t).clamp(min=CLAMP) if isinstance(t, Tensor) else max(1 - t, CLAMP)
