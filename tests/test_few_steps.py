"""Few evaluations: what is taught, on distributions whose flow is exact, in float64.

A block of P tokens with C bits is one of a few corners of the hypercube; then the best prediction is the corners' mean under
their posterior, and the path's end is known to any precision.
"""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.heads.diffusion.sampler import SAMPLERS, guided_velocity
from distill.few_steps import Predict, drawn_guidance, ends, few_steps_loss, guided, loss_of
from distill.few_steps_config import FewSteps

CORNERS_MPC = torch.tensor(
    [[[1, 1], [1, -1]], [[-1, -1], [1, 1]], [[1, -1], [-1, -1]], [[-1, -1], [-1, 1]]], dtype=torch.float64
)  # the bits of a block are tied to one another
SHARE_M = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
LIKELY_M = (2 * SHARE_M.log()).softmax(dim=0)  # what a prompt makes of them
ROWS = 20_000


def exact(share_M: Tensor = SHARE_M) -> Predict:
    """E[bits | x_t] for these shares of the corners."""

    def predict(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        far_MK = (x_KPC[None] - t_K[:, None, None] * CORNERS_MPC[:, None]).square().sum(dim=(-1, -2))
        logit_MK = share_M.log()[:, None] - far_MK / (2 * (1 - t_K) ** 2)
        return torch.einsum("mk,mpc->kpc", logit_MK.softmax(dim=0), CORNERS_MPC)

    return predict


def with_guidance(guidance: float) -> Predict:
    """Of the prompt's corners, guided."""
    given, alone = exact(LIKELY_M), exact()
    return lambda x, t: alone(x, t) + guidance * (given(x, t) - alone(x, t))


def followed(z_KPC: Tensor, teacher: Predict, steps: int = 400) -> Tensor:
    """F(z): the flow followed finely to 0.999."""
    for now, then in itertools.pairwise(torch.linspace(0, 0.999, steps + 1, dtype=torch.float64)):
        z_KPC = z_KPC + (then - now) * (teacher(z_KPC, now[None]) - z_KPC) / (1 - now)
    return z_KPC.sign()


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shares(bits_KPC: Tensor) -> Tensor:
    """How often each corner occurs; what is missing to 1 lies elsewhere."""
    return torch.stack([(bits_KPC == corner).all(dim=-1).all(dim=-1).double().mean() for corner in CORNERS_MPC])


def near(found_M: Tensor, share_M: Tensor, rows: int = ROWS) -> bool:
    """Within four standard deviations of a count."""
    return bool(((found_M - share_M).abs() < 4 * (share_M * (1 - share_M) / rows).sqrt() + 1e-12).all())


def test_the_ends_have_the_joint_distribution_of_the_bits() -> None:
    z_KPC = noise(ROWS)
    assert near(shares(followed(z_KPC, exact())), SHARE_M)
    for steps in (8, 16):
        found = ends(exact(), z_KPC, steps)
        assert near(shares(found), SHARE_M), steps
        second = torch.einsum("ki,kj->ij", found.flatten(1), found.flatten(1)) / ROWS
        wanted = torch.einsum("m,mi,mj->ij", SHARE_M, CORNERS_MPC.flatten(1), CORNERS_MPC.flatten(1))
        assert (second - wanted).abs().max() < 4 / math.sqrt(ROWS)
    alone = torch.where(noise(ROWS, 1) < (exact()(z_KPC, torch.zeros(1)) * 1.25), 1.0, -1.0)
    assert not near(shares(alone.double()), SHARE_M)  # bits drawn by themselves lose what ties them


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_eight_steps_of_the_solver_find_the_ends(guidance: float) -> None:
    z_KPC, teacher = noise(4000), with_guidance(guidance)
    same = (ends(teacher, z_KPC, 8) == followed(z_KPC, teacher)).all(dim=-1).all(dim=-1).double().mean()
    assert same > 0.97


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_visits_the_points_that_are_taught(steps: int) -> None:
    seen: list[tuple[float, Tensor]] = []
    z_KPC, answers = noise(5), [noise(5, seed) for seed in (1, 2, 3, 4)]

    def velocity(x_KPC: Tensor, t: float) -> Tensor:
        seen.append((t, x_KPC))
        return (answers[len(seen) - 1] - x_KPC) / (1 - t)

    found = SAMPLERS["direct"](velocity, z_KPC, steps, lambda: pytest.fail("it takes no draw"))
    assert [t for t, _ in seen] == [k / steps for k in range(steps)]
    for k, (t, x_KPC) in enumerate(seen):
        torch.testing.assert_close(x_KPC, z_KPC if k == 0 else (1 - t) * z_KPC + t * answers[k - 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found, answers[steps - 1], rtol=0, atol=1e-12)


def test_the_loss_is_that_of_two_guesses_and_least_at_the_end() -> None:
    z_KPC, end_KPC, time_K = noise(6), noise(6, 1).sign(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []

    def student(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        seen.append((x_KPC, t_K))
        return 0.5 * end_KPC

    loss_RP, right = loss_of(student, z_KPC, end_KPC, time_K)
    assert torch.equal(loss_RP, torch.full((12, 2), 0.25, dtype=torch.float64)) and float(right) == 1.0
    assert torch.equal(seen[0][0], z_KPC) and not seen[0][1].any()
    t_K11 = time_K[:, None, None]
    torch.testing.assert_close(seen[1][0], (1 - t_K11) * z_KPC + t_K11 * 0.5 * end_KPC, rtol=0, atol=1e-12)
    assert torch.equal(seen[1][1], time_K)
    assert not loss_of(lambda x, t: end_KPC, z_KPC, end_KPC, time_K)[0].any()
    assert float(loss_of(lambda x, t: -end_KPC, z_KPC, end_KPC, time_K)[1]) == 0.0


def test_no_gradient_flows_through_the_first_guess_to_the_second() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z, end, t = noise(64), noise(64, 1).sign(), torch.full((64,), 0.5, dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss_of(lambda x, t: weight * x, z, end, t)[0].mean(), weight)
    line = 0.5 * z + 0.5 * 0.5 * z
    expected = sum((2 * (0.5 * x - end) * x).mean() for x in (z, line)) / 2
    torch.testing.assert_close(grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_small_network_keeps_the_joint_distribution_and_mends_itself(guidance: float) -> None:
    """Four corners out of sixteen, learned in 400 steps: blocks that lie elsewhere become rare with a second evaluation, and more
    noises reach their own end."""
    torch.manual_seed(0)
    teacher = with_guidance(guidance)
    net = nn.Sequential(nn.Linear(5, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 4)).double()

    def student(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        return net(torch.cat([x_KPC.flatten(1), t_K[:, None].expand(len(x_KPC), 1)], dim=1)).unflatten(1, (2, 2))

    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(400):
        z_KPC = torch.randn(512, 2, 2, dtype=torch.float64)
        loss = loss_of(student, z_KPC, ends(teacher, z_KPC, 8), torch.rand(512, dtype=torch.float64))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 400)
    z_KPC = noise(ROWS)
    wanted, found = ends(teacher, z_KPC, 8), {}
    with torch.no_grad():
        for steps in (1, 2):
            velocity = lambda x, t: (student(x, torch.full((1,), t).double()) - x) / (1 - t)  # noqa: E731
            found[steps] = SAMPLERS["direct"](velocity, z_KPC, steps, lambda: pytest.fail("it takes no draw")).sign()
    elsewhere = {steps: 1 - float(shares(bits).sum()) for steps, bits in found.items()}
    same = {steps: float((bits == wanted).all(dim=-1).all(dim=-1).double().mean()) for steps, bits in found.items()}
    assert elsewhere[1] < 0.04 and elsewhere[2] < 0.6 * elsewhere[1], elsewhere
    assert 0.93 < same[1] < same[2], same
    assert (shares(found[2]) - shares(wanted)).abs().max() < 0.03


@pytest.mark.parametrize("per_row", [False, True])
def test_guidance_is_that_of_the_velocities(per_row: bool) -> None:
    head = drawn_head()
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


def test_the_loss_of_a_head_is_that_of_its_predictions() -> None:
    head = drawn_head()
    z, cond = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    end, time_K = z.sign(), torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    found, right = few_steps_loss(head, cond, z, end, time_K)
    expected, also = loss_of(lambda x, t: head(x, t, cond), z, end, time_K)
    assert torch.equal(found, expected) and torch.equal(right, also) and found.shape == (6, 4)


def test_a_scale_for_each_row_is_uniform_and_says_nothing_of_the_noise() -> None:
    z_KPC = torch.randn(ROWS, 2, 2, generator=torch.Generator().manual_seed(3))
    found_K = drawn_guidance(z_KPC, 1.0, 5.0)
    assert torch.equal(found_K[:7], drawn_guidance(z_KPC[:7], 1.0, 5.0))  # of a row alone
    assert float(found_K.min()) >= 1 and float(found_K.max()) <= 5
    counts = torch.histc(found_K, bins=10, min=1, max=5) / ROWS
    assert (counts - 0.1).abs().max() < 4 * math.sqrt(0.09 / ROWS)
    for other in (z_KPC[:, 0, 0], z_KPC[:, 0, 0].abs(), z_KPC[:, 1, 1]):
        assert abs(float(torch.corrcoef(torch.stack([found_K, other]))[0, 1])) < 4 / math.sqrt(ROWS)


def test_guidance_as_an_input_changes_nothing_until_it_is_taught_and_is_smooth_then() -> None:
    head = drawn_head().float()
    x, cond, t_1 = torch.randn(3, 4, 4), torch.randn(3, 4, 8), torch.full((1,), 0.3)
    before = head(x, t_1, cond)
    head.take_guidance(5.0)

    def predicted(*guidance: float) -> Tensor:
        return head.net(x, head.net.time_embed(t_1), head.prepare(cond) + head.embed_guidance(torch.tensor(guidance)))

    assert torch.equal(predicted(3.0), before) and torch.equal(head(x, t_1, cond), before)
    assert {name for name, _ in head.named_parameters() if "guidance" in name} == {"net.guidance_embed.weight"}
    nn.init.normal_(head.net.guidance_embed.weight)
    found = {g: predicted(g) for g in (1.0, 2.0, 2.0001, 5.0)}
    assert (found[2.0] - found[2.0001]).abs().max() < 1e-2
    for one, other in itertools.combinations((1.0, 2.0, 5.0), 2):
        assert (found[one] - found[other]).abs().max() > 1e-2, (one, other)
    by_row = torch.stack([found[g][row] for row, g in enumerate((1.0, 2.0, 5.0))])
    torch.testing.assert_close(predicted(1.0, 2.0, 5.0), by_row, rtol=1e-5, atol=1e-6)
    assert HeadConfig.from_dict(dataclasses.replace(head.config, head_dim=128, ch_latent=128).to_dict()).guidance_max == 5.0
    assert "guidance_max" not in HeadConfig(4, 8, 128, 2, 1, 4).to_dict()  # published files stay as they are
    with pytest.raises(ValueError, match="guidance_max = 1; a number above 1"):
        dataclasses.replace(head.config, guidance_max=1)


def test_each_row_is_taught_at_its_own_guidance() -> None:
    head = drawn_head()
    head.take_guidance(4.0)
    nn.init.normal_(head.net.guidance_embed.weight)
    z, cond = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    end, time_K, g_K = z.sign(), torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64), torch.tensor([1.0, 2.0, 4.0])
    found, _ = few_steps_loss(head, cond, z, end, time_K, g_K)
    for k in range(3):
        row = slice(k, k + 1)
        alone, _ = few_steps_loss(head, cond[row], z[row], end[row], time_K[row], g_K[row])
        torch.testing.assert_close(found[[k, k + 3]], alone)


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 1.0], [5.0, 1.0], [0.5, 2.0], [1.0, 2.0, 3.0], ["1", 2.0], [1.0, 1e6]])
def test_a_range_of_guidance_is_two_scales(wrong: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"few_steps.guidance: guidance_range = .*two guidance scales 1 ≤ low < high"):
        FewSteps(guidance=wrong)  # type: ignore[arg-type]


def test_a_scale_or_a_range_is_what_the_student_starts_from() -> None:
    assert FewSteps().folded(3.0) == 3.0 and FewSteps(guidance=2.0).folded(3.0) == 2.0 and FewSteps().folded(0.0) == 1.0
    taught = FewSteps(guidance=[1, 4])  # type: ignore[arg-type]
    assert taught.range == (1.0, 4.0) and [taught.folded(own) for own in (0.0, 2.5, 9.0)] == [1.0, 2.5, 4.0]
    assert taught.defaults(9.0)["guidance_range"] == [1.0, 4.0] and "guidance_range" not in FewSteps().defaults(9.0)


def drawn_head() -> BinaryDiffusionHead:
    torch.manual_seed(0)
    head = BinaryDiffusionHead(HeadConfig(4, 8, 32, 2, 1, 4, head_dim=32)).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
    return head
