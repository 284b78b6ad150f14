"""From noise to bits' predictions: solvers over t in [0, 1], guidance on velocity.

`denoise(x_KPC, t)` returns predicted data: (K,P,C) or, with guidance, (2K,P,C): conditional rows, then unconditional.
`noise()` returns the next standard normal draw of x's shape. Source: BitDance paper (arXiv 2602.14041), sampling;
published checkpoints for the draw order and the last step.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from bitdance.flow import shift_time, velocity_from_x

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
LAST_STEP = 0.05


def time_grid(steps: int, time_shift: float = 1.0) -> list[float]:
    """steps + 1 times: linspace(0, 0.95, steps + 1), each bent by the time shift. ValueError when steps < 1."""
    if steps < 1:
        raise ValueError(f"steps = {steps}; a sampler needs at least 1 step (published models are tuned for 50)")
    grid = [(1 - LAST_STEP) * i / steps for i in range(steps + 1)]
    return grid if time_shift == 1.0 else [shift_time(t, time_shift) for t in grid]


def guided_velocity(denoise: Denoise, x_KPC: Tensor, t: float, guidance: float) -> Tensor:
    """v_u + g·(v_c - v_u) at time t; guidance g <= 1 means that there is no unconditional branch and v = v_c."""
    x_hat = denoise(x_KPC, t)
    if guidance <= 1:
        assert x_hat.shape == x_KPC.shape, "without guidance there are only conditional rows"
        return velocity_from_x(x_hat, x_KPC, t)
    v_cond, v_uncond = (velocity_from_x(half, x_KPC, t) for half in x_hat.chunk(2))
    return v_uncond + guidance * (v_cond - v_uncond)


def euler_maruyama(
    denoise: Denoise, x_KPC: Tensor, steps: int, noise: Noise, guidance: float = 1.0, time_shift: float = 1.0
) -> Tensor:
    """`steps` stochastic steps on the time grid, then one deterministic step of 0.05; steps + 1 evaluations.

    x_KPC is the initial noise (the first draw); each stochastic step takes one more draw. Returns the prediction
    (K,P,C) whose sign are the bits. Source: published checkpoints' default sampler.
    """
    grid = time_grid(steps, time_shift)
    for t, t_next in pairwise(grid):
        dt = t_next - t
        v = guided_velocity(denoise, x_KPC, t, guidance)
        score = (t * v - x_KPC) / (1 - t)
        drift = v + (1 - t) * score
        x_KPC = x_KPC + drift * dt + math.sqrt(2 * (1 - t) * dt) * noise()
    return _last_step(denoise, x_KPC, guidance)


def euler(
    denoise: Denoise, x_KPC: Tensor, steps: int, noise: Noise, guidance: float = 1.0, time_shift: float = 1.0
) -> Tensor:
    """The deterministic ODE on the same grid, same last step; takes no draw after the initial noise."""
    grid = time_grid(steps, time_shift)
    for t, t_next in pairwise(grid):
        x_KPC = x_KPC + (t_next - t) * guided_velocity(denoise, x_KPC, t, guidance)
    return _last_step(denoise, x_KPC, guidance)


def _last_step(denoise: Denoise, x_KPC: Tensor, guidance: float) -> Tensor:
    # OFFICIAL: the last step is taken at t = 0.95 also when a time shift lets the grid end elsewhere.
    return x_KPC + LAST_STEP * guided_velocity(denoise, x_KPC, 1 - LAST_STEP, guidance)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler_maruyama": euler_maruyama, "euler": euler}
