"""Few evaluations: fixed points of both objectives on distributions whose flow is exact, in float64.

A block of P tokens with C bits is one of a few corners of the hypercube; then the best prediction is the corners' mean under
their posterior, and the path's end is known to any precision.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from bitdance.heads.diffusion.sampler import SAMPLERS, draws
from distill.few_steps import Path, consistency_loss, guided, path_loss, solve

CORNERS_MPC = torch.tensor(
    [[[1, 1], [1, -1]], [[-1, -1], [1, 1]], [[1, -1], [-1, -1]], [[-1, -1], [-1, 1]]], dtype=torch.float64
)  # the bits of a block are tied to one another
SHARE_M = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
ROWS = 20_000


def exact(share_M: Tensor = SHARE_M):
    """E[bits | x_t] for these shares of the corners."""

    def predict(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        t_K11 = t_K[:, None, None]
        far_MK = (x_KPC[None] - t_K11 * CORNERS_MPC[:, None]).square().sum(dim=(-1, -2))
        logit_MK = share_M.log()[:, None] - far_MK / (2 * (1 - t_K) ** 2)
        return torch.einsum("mk,mpc->kpc", logit_MK.softmax(dim=0), CORNERS_MPC)

    return predict


def end(x_KPC: Tensor, t: float, steps: int = 400, teacher=None) -> Tensor:
    """F(x_t, t): the flow followed finely from t on to 0.999."""
    teacher = teacher or exact()
    times = torch.linspace(t, 0.999, steps + 1, dtype=torch.float64)
    for now, then in itertools.pairwise(times):
        x_KPC = x_KPC + (then - now) * (teacher(x_KPC, now[None]) - x_KPC) / (1 - now)
    return x_KPC.sign()


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shares(bits_KPC: Tensor) -> Tensor:
    """How often each corner occurs; what is missing to 1 lies elsewhere."""
    return torch.stack([(bits_KPC == corner).all(dim=-1).all(dim=-1).double().mean() for corner in CORNERS_MPC])


def near(found_M: Tensor, share_M: Tensor, rows: int = ROWS) -> bool:
    """Within four standard deviations of a count."""
    return bool(((found_M - share_M).abs() < 4 * (share_M * (1 - share_M) / rows).sqrt() + 1e-12).all())


def exact_student(x_RPC: Tensor, t_R: Tensor) -> Tensor:
    """F itself, for rows at several times."""
    out = torch.empty_like(x_RPC)
    for t in t_R.unique():
        out[t_R == t] = end(x_RPC[t_R == t], float(t), 120)
    return out


def test_the_ends_of_paths_have_the_joint_distribution_of_the_bits() -> None:
    z_KPC = noise(ROWS)
    assert near(shares(end(z_KPC, 0.0)), SHARE_M)
    for steps in (8, 16):
        ends = solve(exact(), z_KPC, steps).end_KPC
        assert near(shares(ends), SHARE_M), steps
        second = torch.einsum("ki,kj->ij", ends.flatten(1), ends.flatten(1)) / ROWS
        wanted = torch.einsum("m,mi,mj->ij", SHARE_M, CORNERS_MPC.flatten(1), CORNERS_MPC.flatten(1))
        assert (second - wanted).abs().max() < 4 / math.sqrt(ROWS)
    alone = torch.where(torch.rand(ROWS, 4, dtype=torch.float64) < (exact()(z_KPC, torch.zeros(1)).flatten(1) + 1) / 2, 1.0, -1.0)
    assert not near(shares(alone.unflatten(1, (2, 2)).double()), SHARE_M)  # bits drawn by themselves lose what ties them


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_evaluations_of_the_fixed_point_keep_the_distribution(steps: int) -> None:
    drawn = iter([noise(ROWS, seed) for seed in range(draws("consistency", steps))])

    def velocity(x_KPC: Tensor, t: float) -> Tensor:
        return (end(x_KPC, t) - x_KPC) / max(1 - t, 0.05)

    made = SAMPLERS["consistency"](velocity, next(drawn), steps, lambda: next(drawn))
    assert near(shares(made.sign()), SHARE_M) and next(drawn, None) is None


def test_the_path_objective_is_least_at_the_ends() -> None:
    path, place_K = solve(exact(), noise(2000), 8), torch.rand(2000, dtype=torch.float64)
    loss_RP, x_hat = path_loss(exact_student, path, place_K)
    assert loss_RP.shape == (4000, 2) and x_hat.shape == (4000, 2, 2)
    at_best, of_teacher = loss_RP.mean(), path_loss(exact(), path, place_K)[0].mean()
    # points where eight steps of the solver and four hundred disagree lie between two ends
    assert at_best < 0.05 * of_teacher and at_best < 0.02
    wrong = path_loss(lambda x, t: -exact_student(x, t), path, place_K)[0].mean()
    assert wrong > 3.9


def test_a_path_holds_what_the_solver_saw() -> None:
    asked: list[tuple[float, Tensor]] = []

    def teacher(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        asked.append((float(t_K), x_KPC))
        return exact()(x_KPC, t_K)

    path = solve(teacher, noise(50), 6)
    assert path.times == pytest.approx([0.8 * i / 6 for i in range(7)]) and len(path.points) == 7
    assert all(torch.equal(a, b) for (_, a), b in zip(asked, path.points, strict=True))
    assert torch.equal(path.points[0], noise(50)) and bool((path.end_KPC.abs() == 1).all())


def test_the_place_picks_the_point_and_the_start_is_always_there() -> None:
    points = [torch.full((3, 1, 1), float(i)) for i in range(5)]
    seen: list[tuple[list[float], list[float]]] = []

    def student(x_RPC: Tensor, t_R: Tensor) -> Tensor:
        seen.append((x_RPC.flatten().tolist(), t_R.tolist()))
        return torch.zeros_like(x_RPC)

    path = Path([0.0, 0.2, 0.4, 0.6, 0.8], points, torch.ones(3, 1, 1))
    loss_RP, _ = path_loss(student, path, torch.tensor([0.0, 0.49, 0.99]))
    assert seen[0][0] == [0, 0, 0, 1, 2, 4] and seen[0][1] == pytest.approx([0, 0, 0, 0.2, 0.4, 0.8])
    assert torch.equal(loss_RP, torch.ones(6, 1))


def test_consistency_has_the_ends_as_its_fixed_point() -> None:
    """On the line between bits and noise every point hands on the end of the next; only the steps' length is in the way."""
    number_K = torch.multinomial(SHARE_M, 2000, replacement=True, generator=torch.Generator().manual_seed(1))
    bits_KPC = CORNERS_MPC[number_K]
    place_K = torch.linspace(0, 1 - 1e-6, 2000, dtype=torch.float64)

    def loss(student, steps: int, place_K: Tensor = place_K) -> float:
        return float(consistency_loss(student, exact(), bits_KPC, noise(2000), place_K, steps)[0].mean())

    coarse, fine = loss(exact_student, 8), loss(exact_student, 64)
    assert fine < 0.02 and fine < coarse < 0.2
    last_K = torch.full_like(place_K, 1 - 1e-6)  # the last step ties it to the teacher: here half the bits are wrong, by 2 each
    assert loss(lambda x, t: exact_student(x, t) * torch.tensor([1.0, -1.0]), 64, last_K) == pytest.approx(2.0, abs=0.05)
    constant = consistency_loss(lambda x, t: torch.ones_like(x), exact(), bits_KPC, noise(2000), place_K, 1)
    assert float(constant[0][place_K < 0.5].mean()) == 0  # in itself any constant is consistent
    assert float(constant[0][place_K > 0.5].mean()) > 0.5  # the end is not


def test_no_gradient_flows_through_the_target() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    bits_KPC, t = CORNERS_MPC[:1].repeat(64, 1, 1), torch.zeros(64, dtype=torch.float64)
    loss = consistency_loss(lambda x, t: weight * x, exact(), bits_KPC, noise(64), t, 4)[0].mean()
    (grad,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        z = noise(64)
        ahead = weight * (z + 0.2 * (exact()(z, torch.zeros(1, dtype=torch.float64)) - z))
    expected = (2 * (weight.detach() * z - ahead) * z).mean()
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("per_row", [False, True])
def test_guidance_is_that_of_the_velocities(per_row: bool) -> None:
    from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
    from bitdance.heads.diffusion.sampler import guided_velocity

    torch.manual_seed(0)
    head = BinaryDiffusionHead(HeadConfig(4, 8, 32, 2, 1, 4, head_dim=32)).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, cond, uncond = (torch.randn(3, 4, width, dtype=torch.float64) for width in (4, 8, 8))
    g = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)[:, None, None] if per_row else torch.full((1, 1, 1), 2.5).double()
    t_K = torch.full((3 if per_row else 1,), 0.25, dtype=torch.float64)
    found = guided(head, cond, uncond, g)(x, t_K)
    embedded = head.prepare(torch.cat([cond, uncond]))
    for row in range(3):
        scale = float(g[row if per_row else 0])
        denoise = lambda x, t, both: head.denoise(x, head.embed_time(t), embedded if both else embedded[:3])  # noqa: E731
        expected = x + 0.75 * guided_velocity(denoise, x, 0.25, max(scale, 1 + 1e-12))
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-4)  # the time's embedding is float32
