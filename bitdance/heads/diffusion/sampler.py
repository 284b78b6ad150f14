"""From noise to bits' predictions: solvers over t in [0, 1], guidance on velocity.

A solver takes `velocity(x_KPC, t)` and `noise()`, the next standard normal draw of x's shape. `denoise(x_KPC, t, both)`
returns predicted data: conditional rows (K,P,C), with `both` the unconditional ones behind them (2K,P,C). Source: BitDance
paper (arXiv 2602.14041), sampling; published checkpoints for the draw order and the last step.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from bitdance.heads.diffusion.flow import interpolate, shift_time, velocity_from_x, x_from_velocity

Denoise = Callable[[Tensor, float, bool], Tensor]
Velocity = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
LAST_STEP = 0.05
DECIDED = 0.8  # from here on few signs of predicted bits still change


def time_grid(steps: int, time_shift: float = 1.0, end: float = 1 - LAST_STEP) -> list[float]:
    """steps + 1 times: linspace(0, end, steps + 1), each bent by the time shift. ValueError when steps < 1."""
    if steps < 1:
        raise ValueError(f"steps = {steps}; a sampler needs at least 1 step (published models are tuned for 50)")
    grid = [end * i / steps for i in range(steps + 1)]
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


def heun(velocity: Velocity, x_KPC: Tensor, steps: int, noise: Noise, time_shift: float = 1.0) -> Tensor:
    """The ODE in second order: each step is repeated with the mean of the velocities at its two ends.

    Deterministic, same grid, same last step; 2·steps + 1 evaluations, each step costs two of Euler's.
    """
    for t, t_next in pairwise(time_grid(steps, time_shift)):
        dt, v = t_next - t, velocity(x_KPC, t)
        x_KPC = x_KPC + dt / 2 * (v + velocity(x_KPC + dt * v, t_next))
    return _last_step(velocity, x_KPC)


def dpmpp_2m(velocity: Velocity, x_KPC: Tensor, steps: int, noise: Noise, time_shift: float = 1.0) -> Tensor:
    """The ODE in second order with one evaluation per step: DPM-Solver++(2M) on the path of this model.

    dx/dt = (x̂ - x)/(1-t) has the solution x_s = r·x_t + (1-s)·∫ x̂(u)/(1-u)² du with r = (1-s)/(1-t). The predicted data x̂
    is taken as linear in u through the last two evaluations, x̂(u) = x̂_t + (u-t)·D, which makes the integral
    (1-r)·x̂_t + (1-t)·(1 - r + r·log r)·D; the first step has D = 0, which is Euler's.
    # OURS: linear in t instead of in log(t/(1-t)), which is infinite at t = 0 and would leave two steps in first order.
    # OURS: the grid ends at 0.8 and the prediction made there is returned: signs need no more, and the steps are smaller.
    Deterministic. Source: Lu et al. 2022 (arXiv 2211.01095).
    """
    before = None
    for t, t_next in pairwise(times := time_grid(steps, time_shift, DECIDED)):
        data = x_from_velocity(velocity(x_KPC, t), x_KPC, t)
        r = (1 - t_next) / (1 - t)
        x_KPC = r * x_KPC + (1 - r) * data
        if before is not None:
            x_KPC = x_KPC + (1 - t) * (1 - r + r * math.log(r)) * _slope(before, (t, data))
        before = t, data
    return x_from_velocity(velocity(x_KPC, times[-1]), x_KPC, times[-1])


def dpmpp_2m_sde(velocity: Velocity, x_KPC: Tensor, steps: int, noise: Noise, time_shift: float = 1.0) -> Tensor:
    """Euler–Maruyama's SDE in second order with one evaluation and one draw per step.

    dx = [(1+t)·x̂ - 2x]/(1-t) dt + sqrt(2(1-t)) dW has the solution, with a = 1-t, b = 1-s and r = b/a,
    x_s = r²·x_t + b²·∫ (1+u)·x̂(u)/(1-u)³ du + b·sqrt(1 - r²)·z: few steps lose no noise. With x̂ linear in u as in
    `dpmpp_2m` the integral is (s - r²·t)·x̂_t + [a - (2+a)·b + (1+a)·r·b - b²·log r]·D. Second order in mean and variance.
    Grid and end as in `dpmpp_2m`. Source of the idea: SDE form of DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095).
    """
    before = None
    for t, t_next in pairwise(times := time_grid(steps, time_shift, DECIDED)):
        data = x_from_velocity(velocity(x_KPC, t), x_KPC, t)
        a, b = 1 - t, 1 - t_next
        r = b / a
        x_KPC = r**2 * x_KPC + (t_next - r**2 * t) * data + b * math.sqrt(1 - r**2) * noise()
        if before is not None:
            x_KPC = x_KPC + (a - (2 + a) * b + (1 + a) * r * b - b**2 * math.log(r)) * _slope(before, (t, data))
        before = t, data
    return x_from_velocity(velocity(x_KPC, times[-1]), x_KPC, times[-1])


def direct(velocity: Velocity, x_KPC: Tensor, steps: int, noise: Noise, time_shift: float = 1.0) -> Tensor:
    """For a head that was taught where its path ends (`distill/few_steps.py`): `steps` evaluations, the first from noise at
    t = 0, each further one at t = k/steps from the line between that noise and the last prediction. Deterministic."""
    data, start_KPC = x_KPC, x_KPC
    for t in time_grid(steps, time_shift, 1.0)[:-1]:
        x_KPC = interpolate(data, start_KPC, t)
        data = x_from_velocity(velocity(x_KPC, t), x_KPC, t)
    return data


def _slope(before: tuple[float, Tensor], now: tuple[float, Tensor]) -> Tensor:
    return (now[1] - before[1]) / (now[0] - before[0])


def _last_step(velocity: Velocity, x_KPC: Tensor) -> Tensor:
    # OFFICIAL: the last step is taken at t = 0.95 also when a time shift lets the grid end elsewhere.
    return x_KPC + LAST_STEP * velocity(x_KPC, 1 - LAST_STEP)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler_maruyama": euler_maruyama,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "direct": direct,
}
STOCHASTIC = {"euler_maruyama", "dpmpp_2m_sde"}  # take one draw per step


def draws(sampler: str, steps: int) -> int:
    """Standard normal draws of a block, the initial noise included."""
    return 1 + (steps if sampler in STOCHASTIC else 0)
