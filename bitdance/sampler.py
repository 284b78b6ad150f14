"""From noise to bits' predictions: solvers over t in [0, 1], guidance on velocity.

A solver takes `velocity(x_KPC, t)` and `noise()`, the next standard normal draw of x's shape. `denoise(x_KPC, t, both)`
returns predicted data: conditional rows (K,P,C), with `both` the unconditional ones behind them (2K,P,C). Source: BitDance
paper (arXiv 2602.14041), sampling; published checkpoints for the draw order and the last step.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from bitdance.flow import shift_time, velocity_from_x

Denoise = Callable[[Tensor, float, bool], Tensor]
Velocity = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
LAST_STEP = 0.05


def time_grid(steps: int, time_shift: float = 1.0) -> list[float]:
    """steps + 1 times: linspace(0, 0.95, steps + 1), each bent by the time shift. ValueError when steps < 1."""
    if steps < 1:
        raise ValueError(f"steps = {steps}; a sampler needs at least 1 step (published models are tuned for 50)")
    grid = [(1 - LAST_STEP) * i / steps for i in range(steps + 1)]
    return grid if time_shift == 1.0 else [shift_time(t, time_shift) for t in grid]


def guided_velocity(
    denoise: Denoise, x_KPC: Tensor, t: float, guidance: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """v_u + g·(v_c - v_u) at time t; v_c alone for guidance g <= 1 and at times outside `interval`."""
    if guidance <= 1 or not interval[0] <= t <= interval[1]:
        return velocity_from_x(denoise(x_KPC, t, False), x_KPC, t)
    v_cond, v_uncond = (velocity_from_x(half, x_KPC, t) for half in denoise(x_KPC, t, True).chunk(2))
    return v_uncond + guidance * (v_cond - v_uncond)


def euler_maruyama(velocity: Velocity, x_KPC: Tensor, steps: int, noise: Noise, time_shift: float = 1.0) -> Tensor:
    """`steps` stochastic steps on the time grid, then one deterministic step of 0.05; steps + 1 evaluations.

    x_KPC is the initial noise (the first draw); each stochastic step takes one more draw. Returns the prediction
    (K,P,C) whose sign are the bits. Source: published checkpoints' default sampler.
    """
    for t, t_next in pairwise(time_grid(steps, time_shift)):
        dt = t_next - t
        v = velocity(x_KPC, t)
        score = (t * v - x_KPC) / (1 - t)
        drift = v + (1 - t) * score
        x_KPC = x_KPC + drift * dt + math.sqrt(2 * (1 - t) * dt) * noise()
    return _last_step(velocity, x_KPC)


def euler(velocity: Velocity, x_KPC: Tensor, steps: int, noise: Noise, time_shift: float = 1.0) -> Tensor:
    """The deterministic ODE on the same grid, same last step; takes no draw after the initial noise."""
    for t, t_next in pairwise(time_grid(steps, time_shift)):
        x_KPC = x_KPC + (t_next - t) * velocity(x_KPC, t)
    return _last_step(velocity, x_KPC)


def _last_step(velocity: Velocity, x_KPC: Tensor) -> Tensor:
    # OFFICIAL: the last step is taken at t = 0.95 also when a time shift lets the grid end elsewhere.
    return x_KPC + LAST_STEP * velocity(x_KPC, 1 - LAST_STEP)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler_maruyama": euler_maruyama, "euler": euler}
STOCHASTIC = {"euler_maruyama"}  # take one draw per step


def draws(sampler: str, steps: int) -> int:
    """Standard normal draws of a block, the initial noise included."""
    return 1 + (steps if sampler in STOCHASTIC else 0)
