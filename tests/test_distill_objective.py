"""The three terms of distillation, and what the derivation in `distill/objective.py` claims of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_distill_view import REPEATS, drawn, view_of
from tiny_model import tiny_model

from bitdance.heads.diffusion.flow import interpolate, velocity_from_x
from bitdance.model import BitDanceModel
from distill.config import DistillTraining, Objectives
from distill.documents import DistillBatch
from distill.growth import grow
from distill.objective import DistillObjective, fading, squared_velocity, sub_patches_after
from distill.teacher import Teacher
from stages.config import GeneratorTraining

# ---------------------------------------------------------------------------------------- the derivation, computed exactly


def bits_and_noise(t: float, rho: float) -> tuple[Any, Any, Any, Any]:
    """A patch of two sub-patches of one bit each, with correlation rho: a fine grid of what is seen, and each pair's density.

    Returns p(y1, y2) and E[x_s | S], m_1(y1) = E[x_1 | T_1] and m_2(x_1, y2) = E[x_2 | T_2], averaged over x_1 given S.
    """
    y = np.linspace(-4, 4, 401)
    own = {x: np.exp(-((y - t * x) ** 2) / (2 * (1 - t) ** 2)) + 1e-150 for x in (-1, 1)}  # above 0, so that all divisions hold
    joint = {(a, b): (1 + rho * a * b) / 4 for a in (-1, 1) for b in (-1, 1)}
    density = {ab: joint[ab] * np.outer(own[ab[0]], own[ab[1]]) for ab in joint}
    total = sum(density.values())
    with_all = [sum(ab[s] * density[ab] for ab in joint) / total for s in (0, 1)]
    m1 = (own[1] - own[-1]) / (own[1] + own[-1])
    m2 = {a: sum(b * joint[a, b] * own[b] for b in (-1, 1)) / sum(joint[a, b] * own[b] for b in (-1, 1)) for a in (-1, 1)}
    first = {a: sum(density[a, b] for b in (-1, 1)) / total for a in (-1, 1)}  # p(x_1 = a | S)
    said = [np.broadcast_to(m1[:, None], total.shape), sum(first[a] * m2[a][None, :] for a in (-1, 1))]
    return total / total.sum(), with_all, said, (y, own, joint)


def gap(t: float, rho: float, s: int) -> float:
    """Mean square of E[x_s | S] − E[m_s | S]."""
    density, best, said, _ = bits_and_noise(t, rho)
    return float((density * (best[s] - said[s]) ** 2).sum())


def test_the_last_sub_patch_has_no_gap_at_any_time() -> None:
    assert max(gap(t, 0.9, 1) for t in (0.05, 0.3, 0.5, 0.7, 0.9)) < 1e-12


def test_the_gap_of_an_earlier_sub_patch_is_in_the_middle() -> None:
    gaps = {t: gap(t, 0.9, 0) for t in (0.02, 0.2, 0.4, 0.6, 0.9)}
    assert gaps[0.02] < 1e-3 and gaps[0.9] < 1e-3
    assert gaps[0.4] > 10 * max(gaps[0.02], gaps[0.9])
    assert gap(0.4, 0.0, 0) < 1e-12, "independent sub-patches tell nothing about one another"


def test_the_gap_is_at_most_twice_the_missing_information() -> None:
    t, rho = 0.4, 0.9
    density, _, _, (_, own, joint) = bits_and_noise(t, rho)

    def entropy_bits(p: Any) -> Any:
        p = np.clip(p, 1e-15, 1 - 1e-15)
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    with_all = sum(joint[1, b] * np.outer(own[1], own[b]) for b in (-1, 1))
    with_all /= sum(joint[ab] * np.outer(own[ab[0]], own[ab[1]]) for ab in joint)
    alone = own[1] / (own[1] + own[-1])
    information = float((density * (entropy_bits(alone)[:, None] - entropy_bits(with_all))).sum())
    assert 0 < gap(t, rho, 0) <= 2 * information


def test_the_teachers_target_varies_less_than_the_bits() -> None:
    """Var(x_2 | S) = Var(m_2 | S) + E[Var(x_2 | T_2) | S]: the target loses just the variance that the teacher cannot explain."""
    density, best, said, (_, own, joint) = bits_and_noise(0.3, 0.9)
    m2 = {a: sum(b * joint[a, b] * own[b] for b in (-1, 1)) / sum(joint[a, b] * own[b] for b in (-1, 1)) for a in (-1, 1)}
    total = sum(joint[ab] * np.outer(own[ab[0]], own[ab[1]]) for ab in joint)
    first = {a: sum(joint[a, b] * np.outer(own[a], own[b]) for b in (-1, 1)) / total for a in (-1, 1)}
    of_target = float((density * sum(first[a] * (m2[a][None, :] - said[1]) ** 2 for a in (-1, 1))).sum())
    unexplained = float((density * sum(first[a] * (1 - m2[a][None, :] ** 2) for a in (-1, 1))).sum())
    of_bits = float((density * (1 - best[1] ** 2)).sum())
    assert of_bits == pytest.approx(of_target + unexplained, rel=1e-9) and of_target < 0.8 * of_bits


# ---------------------------------------------------------------------------------------- the code


def test_sub_patches_after_counts_in_raster_order() -> None:
    first, last = [3, 3, 2, 2], [1, 1, 0, 0]
    torch.testing.assert_close(sub_patches_after(4, 2).view(4, 4), torch.tensor([first, first, last, last]) / 3)
    assert sub_patches_after(6, 2).unique().tolist() == pytest.approx([number / 8 for number in range(9)])


def test_the_teacher_fades_to_nothing() -> None:
    assert [fading(step, 4) for step in (0, 1, 2, 4, 9)] == [1, 0.75, 0.5, 0, 0]
    assert fading(10**9, 0) == 1


def test_the_noisy_point_cancels_in_a_difference_of_velocities() -> None:
    generator = torch.Generator().manual_seed(0)
    x, x_hat, noise = (torch.randn(5, 4, 3, generator=generator) for _ in range(3))
    t = torch.tensor([0.0, 0.3, 0.6, 0.94, 0.99])[:, None, None]
    x_t = interpolate(x, noise, t)
    wanted = (velocity_from_x(x_hat, x_t, t) - velocity_from_x(x, x_t, t)).square().mean(-1)
    torch.testing.assert_close(squared_velocity(x_hat, x, t), wanted, rtol=1e-4, atol=1e-5)


def pair() -> tuple[BitDanceModel, BitDanceModel]:
    return tiny_model(P=4, diff_batch_mul=REPEATS), grow(tiny_model(P=4, seed=1, diff_batch_mul=REPEATS), 4)


def objective(weights: Objectives, student: BitDanceModel, teacher: BitDanceModel, **changes: Any) -> DistillObjective:
    distill = DistillTraining(teacher="t", objectives=weights, samples=("s",), **changes)
    return DistillObjective(student, GeneratorTraining(dropout=0.0), distill, 4, Teacher(teacher))


def loss(weights: Objectives, step: int = 0, **changes: Any) -> tuple[float, dict[str, float]]:
    teacher, student = pair()
    view, batch = view_of(student, teacher, drawn(student), 260)
    made = objective(weights, student, teacher, **changes)
    with torch.no_grad():
        value, scalars, _ = made(DistillBatch(batch, {}, [view]), torch.Generator(), step)
    return float(value), {name: float(scalar) for name, scalar in scalars.items()}


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    data, known = loss(Objectives(1.0, 0.0, 0.0))
    pulled, _ = loss(Objectives(0.0, 1.0, 0.0))
    text = 0.01 * known["text"]
    assert data == pytest.approx(known["vision"] + text, rel=1e-5)
    both, _ = loss(Objectives(2.0, 3.0, 0.5))
    assert both == pytest.approx(2.5 * (data - text) + 3 * (pulled - text) + text, rel=1e-5)


def test_the_teachers_term_fades_with_time_and_with_steps() -> None:
    flat, known = loss(Objectives(0.0, 1.0, 0.0), fade=0.0)
    text = 0.01 * known["text"]
    assert flat == pytest.approx(known["pull"] + text, rel=1e-5), "without fading all times and sub-patches count alike"
    faded, _ = loss(Objectives(0.0, 1.0, 0.0), fade=2.0)
    assert faded < flat
    half, _ = loss(Objectives(0.0, 1.0, 0.0), step=5, fade=0.0, fade_steps=10)
    assert half == pytest.approx(known["pull"] / 2 + text, rel=1e-5)
    gone, said = loss(Objectives(1.0, 1.0, 0.0), step=10, fade_steps=10)
    assert gone == loss(Objectives(1.0, 0.0, 0.0))[0] and "pull" not in said, "then the teacher is not even asked"


def test_a_teacher_that_knows_the_bits_teaches_what_data_teach() -> None:
    """With true bits as predictions, and every time and place of weight one, the pull is the loss on data, gradients included."""
    grads = []
    for weights in (Objectives(1.0, 0.0, 0.0), Objectives(0.0, 1.0, 0.0)):
        teacher, student = pair()
        _, batch = view_of(student, teacher, drawn(student), 260)
        made = objective(weights, student, teacher, fade=0.0)
        bits_SMPC = batch.image_bits_NC.unflatten(0, (-1, 16)).expand(REPEATS, -1, -1, -1)
        value, _, _ = made(DistillBatch(batch, {}, [], bits_SMPC), torch.Generator(), 0)
        value.backward()
        grads.append(torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-5


def test_the_teacher_gets_no_gradient_and_is_no_part_of_what_is_saved() -> None:
    teacher, student = pair()
    view, batch = view_of(student, teacher, drawn(student))
    made = objective(Objectives(1.0, 1.0, 0.0), student, teacher)
    value, _, _ = made(DistillBatch(batch, {}, [view]), torch.Generator(), 0)
    value.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in made.parameters()}
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in student.parameters())


def test_what_is_logged_of_the_teacher_is_its_own_loss() -> None:
    _, said = loss(Objectives(1.0, 1.0, 0.0))
    teacher, student = pair()
    view, batch = view_of(student, teacher, drawn(student), 260)
    with torch.no_grad():
        own = teacher(view.seen(batch)).vision
    assert said["teacher"] == pytest.approx(float(own), rel=1e-4)
    levels = [value for name, value in said.items() if name.startswith("teacher_at_t/") and not math.isnan(value)]
    assert levels and min(levels) <= said["teacher"] <= max(levels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"data": 0.0}}, "all weights are 0"),
        ({"objectives": {"data": -1.0}}, "objectives.data = -1.0"),
        ({"objectives": {"samples": 1.0}}, "distill.samples is empty.*--write-samples"),
        ({"guidance": 3.0}, "real pictures"),
        ({"dtype": "float8"}, "'float32', 'bfloat16', 'float16'"),
        ({"fade": -1.0}, "distill.fade = -1.0"),
        ({"fade_steps": -1}, "distill.fade_steps = -1"),
        ({"teacher": ""}, "distill.teacher is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given = dict(changes)
        if "objectives" in given:
            given["objectives"] = Objectives(**given["objectives"])
        DistillTraining(**{"teacher": "demo", **given})
