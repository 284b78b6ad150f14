"""Solvers against solutions that are known exactly."""

import math
from itertools import pairwise

import pytest
import torch

from bitdance.costs.work import evaluations
from bitdance.heads.diffusion.flow import interpolate, velocity_from_x
from bitdance.heads.diffusion.sampler import (
    SAMPLERS,
    STOCHASTIC,
    draws,
    euler,
    euler_maruyama,
    guided_velocity,
    time_grid,
)
from bitdance.heads.diffusion.settings import Sampling


def noise_like(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def following(predict):
    """The velocity towards what `predict(x, t)` takes for the data."""
    return lambda x, t: velocity_from_x(predict(x, t), x, t)


def no_noise():
    raise AssertionError("no draw is due")


def test_euler_follows_the_straight_path_to_a_constant_prediction():
    data, start, seen = torch.full((2, 3, 4), 0.7, dtype=torch.float64), noise_like((2, 3, 4))(), []

    def predict_the_data(x, t):
        seen.append((t, x))
        return data

    end = euler(following(predict_the_data), start, 7, no_noise)
    assert [t for t, _ in seen] == pytest.approx([0.95 * i / 7 for i in range(7)] + [0.95])
    for t, x in seen:
        assert (x - interpolate(data, start, t)).abs().max() <= 1e-12
    assert (end - data).abs().max() <= 1e-12


def test_euler_maruyama_spreads_as_its_closed_form():
    """For the prediction 0 a step multiplies x by 1 - 2dt/(1-t) and adds noise of variance 2(1-t)dt."""
    steps, n, spread = 20, 200_000, []

    def predict_zero(x, t):
        spread.append(x.var().item())
        return torch.zeros_like(x)

    draw = noise_like((1, 1, n), seed=5)
    end = euler_maruyama(following(predict_zero), draw(), steps, draw)
    variance, expected = 1.0, [1.0]
    for t, t_next in zip(time_grid(steps), time_grid(steps)[1:]):
        dt = t_next - t
        variance = variance * (1 - 2 * dt / (1 - t)) ** 2 + 2 * (1 - t) * dt
        expected.append(variance)
    for found, exact in zip(spread, expected, strict=True):
        assert abs(found - exact) < 5 * exact * math.sqrt(2 / n)
    assert end.abs().max() <= 1e-12  # the last step lands on the prediction
    assert expected[10] == pytest.approx((1 - time_grid(steps)[10]) ** 2, rel=0.2)  # near the path's own noise level


def test_stochastic_steps_take_one_draw_each_and_the_last_step_none():
    shape, drawn, evaluated = (2, 3, 4), [], []
    draw = noise_like(shape)
    denoise = lambda x, t: evaluated.append(t) or torch.tanh(x)  # noqa: E731
    euler_maruyama(following(denoise), draw(), 6, lambda: drawn.append(1) or draw())
    assert len(drawn) == 6 and len(evaluated) == 7


def test_guidance_acts_on_the_velocity():
    x = noise_like((2, 3, 4))()
    cond, uncond = noise_like((2, 2, 3, 4), seed=1)()
    v = guided_velocity(lambda x, t, both: torch.cat([cond, uncond]) if both else cond, x, 0.3, 7.5)
    v_cond, v_uncond = velocity_from_x(cond, x, 0.3), velocity_from_x(uncond, x, 0.3)
    assert torch.equal(v, v_uncond + 7.5 * (v_cond - v_uncond))


@pytest.mark.parametrize("guidance", [1.0, 0.5, 0.0, -2.0])
def test_guidance_up_to_one_is_no_guidance(guidance):
    x, cond = noise_like((2, 3, 4))(), noise_like((2, 3, 4), seed=1)()
    v = guided_velocity(lambda x, t, both: torch.cat([cond, -cond]) if both else cond, x, 0.3, guidance)
    assert torch.equal(v, velocity_from_x(cond, x, 0.3))


ORDER = {"euler_maruyama": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_2m_sde": 2}
END = {"dpmpp_2m": 0.8, "dpmpp_2m_sde": 0.8}


def spread_of_gaussian_data(name, steps, variance):
    """Standard deviation of what the solver returns for data N(0, variance), minus the exact one, without sampling.

    The best prediction of such data is linear in x, so what is returned is a weighted sum of the draws; a batch in which row
    j sees 1 in draw j and 0 elsewhere shows the weights.
    """
    gain = lambda t: t * variance / (t * t * variance + (1 - t) ** 2)  # noqa: E731
    rows = iter(torch.eye(draws(name, steps), dtype=torch.float64)[..., None, None])
    predict = lambda x, t: gain(t) * x  # noqa: E731
    end = SAMPLERS[name](following(predict), next(rows), steps, lambda: next(rows))
    assert next(rows, None) is None  # as many draws as `draws` says
    t = END.get(name, 0.95)  # what is returned is the prediction there
    exact = gain(t) * math.sqrt(t**2 * variance + (1 - t) ** 2)
    return end.square().sum().sqrt().item() - exact


@pytest.mark.parametrize("variance", [0.3, 3.0])
@pytest.mark.parametrize("name", sorted(ORDER))
def test_a_solver_has_its_order(name, variance):
    """Twice the steps: half the error in first order, a quarter in second, once steps are small."""
    errors = [spread_of_gaussian_data(name, steps, variance) for steps in (160, 320, 640)]
    for coarse, fine in pairwise(errors):
        assert 0.85 * 2 ** ORDER[name] < coarse / fine < 1.15 * 2 ** ORDER[name]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_a_deterministic_solver_follows_the_straight_path_to_a_constant_prediction(name, steps):
    data, start, seen = torch.full((2, 3, 4), 0.7, dtype=torch.float64), noise_like((2, 3, 4))(), []
    end = SAMPLERS[name](following(lambda x, t: seen.append((t, x)) or data), start, steps, no_noise)
    for t, x in seen:
        assert (x - interpolate(data, start, t)).abs().max() <= 1e-12
    assert (end - data).abs().max() <= 1e-12


def test_the_second_order_sde_is_exact_for_a_prediction_linear_in_time():
    """Its path without noise against the drift, integrated finely; from the second step on, where a slope is known."""
    predict, seen = (lambda t: 0.5 - 0.8 * t), []
    drift = lambda m, t: ((1 + t) * predict(t) - 2 * m) / (1 - t)  # noqa: E731
    start = torch.ones(1, 1, 1, dtype=torch.float64)
    denoise = lambda x, t: seen.append((t, x.item())) or torch.full_like(x, predict(t))  # noqa: E731
    SAMPLERS["dpmpp_2m_sde"](following(denoise), start, 4, lambda: torch.zeros_like(start))
    for (t, m), (t_next, found) in pairwise(seen[1:]):
        h = (t_next - t) / 1000
        for _ in range(1000):  # midpoint rule
            m, t = m + h * drift(m + h / 2 * drift(m, t), t + h / 2), t + h
        assert found == pytest.approx(m, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_second_order_sde_keeps_the_noise_level_in_any_number_of_steps(steps):
    """For a constant prediction every step is exact: mean t·x̂, spread 1 - t."""
    n, seen = 40_000, []
    draw = noise_like((1, 1, n), seed=3)
    predict = lambda x, t: seen.append((t, x)) or torch.full_like(x, 0.7)  # noqa: E731
    SAMPLERS["dpmpp_2m_sde"](following(predict), draw(), steps, draw)
    for t, x in seen:
        assert abs(x.mean().item() - 0.7 * t) < 5 * (1 - t) / math.sqrt(n)
        assert abs(x.std().item() - (1 - t)) < 5 * (1 - t) / math.sqrt(2 * n)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_solver_evaluates_as_often_as_it_says(name):
    evaluated, drawn, draw = [], [], noise_like((2, 3, 4))
    SAMPLERS[name](following(lambda x, t: evaluated.append(t) or torch.tanh(x)), draw(), 6, lambda: drawn.append(1) or draw())
    assert len(evaluated) == len(evaluations(Sampling(6, 1.0, name), 6)) == {"heun": 13, "direct": 6}.get(name, 7)
    assert 1 + len(drawn) == draws(name, 6) == (7 if name in STOCHASTIC else 1)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_an_error(name, steps):
    with pytest.raises(ValueError, match="at least 1 step"):
        SAMPLERS[name](lambda x, t: x, torch.zeros(1, 1, 1), steps, no_noise)


def test_time_shift_bends_the_grid():
    plain, shifted = time_grid(5), time_grid(5, 2.5)
    assert shifted[0] == 0.0 and all(s < p for s, p in zip(shifted[1:], plain[1:], strict=True))
    a, t = 2.5, 0.95
    assert shifted[-1] == pytest.approx((1 / a) / (1 / a + 1 / t - 1))
