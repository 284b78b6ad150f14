"""The path and its inverses, as identities in float64."""

import math

import pytest
import torch

from bitdance.heads.diffusion.flow import CLAMP, draw_time, interpolate, shift_time, velocity_from_x, x_from_velocity


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TIMES = torch.linspace(0, 0.95, 39, dtype=torch.float64)[:, None]


def test_path_starts_at_noise_and_ends_at_data():
    x, e = draws(2, 50)
    assert torch.equal(interpolate(x, e, 0.0), e)
    assert torch.equal(interpolate(x, e, 1.0), x)


def test_velocity_and_data_are_inverse_of_each_other():
    x, x_t = draws(2, 39, 50)
    assert (x_from_velocity(velocity_from_x(x, x_t, TIMES), x_t, TIMES) - x).abs().max() <= 1e-12
    v = draws(39, 50)
    assert (velocity_from_x(x_from_velocity(v, x_t, TIMES), x_t, TIMES) - v).abs().max() <= 1e-12


def test_velocity_of_the_true_data_is_data_minus_noise():
    x, e = draws(2, 39, 50)
    assert (velocity_from_x(x, interpolate(x, e, TIMES), TIMES) - (x - e)).abs().max() <= 1e-12


@pytest.mark.parametrize("t", [0.951, 0.99, 1.0])
def test_velocity_is_clamped_near_the_data(t):
    x, x_t = draws(2, 50)
    for time in (t, torch.tensor(t, dtype=torch.float64)):
        assert torch.equal(velocity_from_x(x, x_t, time), (x - x_t) / CLAMP)
        assert torch.equal(x_from_velocity(x, x_t, time), x_t + CLAMP * x)


def test_time_shift_is_the_published_formula_and_undone_by_its_inverse():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for a in (0.5, 1.0, 3.0):
        assert (shift_time(t, a) - (1 / a) / (1 / a + (1 / t - 1))).abs().max() <= 1e-12
        assert (shift_time(shift_time(t, a), 1 / a) - t).abs().max() <= 1e-12
        assert shift_time(0.0, a) == 0.0 and shift_time(1.0, a) == 1.0
    assert shift_time(0.5, 3.0) < 0.5 < shift_time(0.5, 0.5)


def test_drawn_times_have_the_promised_distribution():
    rows = 20_000
    generator = torch.Generator().manual_seed(1)
    logit = torch.logit(draw_time(rows, "logit_normal", -0.8, 0.8, 1.0, generator).double())
    assert abs(logit.mean() + 0.8) < 5 * 0.8 / math.sqrt(rows)
    assert abs(logit.std() - 0.8) < 5 * 0.8 / math.sqrt(2 * rows)
    uniform = draw_time(rows, "uniform", -0.8, 0.8, 1.0, generator)
    assert abs(uniform.mean() - 0.5) < 5 / math.sqrt(12 * rows) and uniform.min() >= 0 and uniform.max() < 1


def test_drawn_times_are_shifted():
    plain = draw_time(8, "uniform", 0.0, 1.0, 1.0, torch.Generator().manual_seed(3))
    shifted = draw_time(8, "uniform", 0.0, 1.0, 3.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(shifted, shift_time(plain, 3.0))


def test_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="logit_normal, uniform"):
        draw_time(2, "cosine", 0.0, 1.0, 1.0, None)
