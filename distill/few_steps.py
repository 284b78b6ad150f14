"""Objectives that teach a head to reach the end of its guided path in one, two or four evaluations.

A head predicts the bits x̂(x_t, t) of a noisy block. With guidance g the teacher's prediction is x̂_g = x̂_u + g·(x̂_c − x̂_u), and

    dx/dt = (x̂_g(x, t) − x) / (1 − t)        from normal noise at t = 0

leads every point to an end F(x_t, t) in {−1,+1}^(P·C). F is constant along a path, and F(·, 0) turns noise into whole blocks:
what ties the bits of a block to one another is in it. The student f is the same network, called once; it sees x_t, t and the
condition with the prompt or class alone, so guidance costs it nothing. Both objectives have f = F as their fixed point:

**path**: E|f(x_i, t_i) − F|² over points of a path that the teacher has solved, the noise at its start always among them. The
end is a function of the point, so the minimiser is F, up to the teacher's solver. A path costs as many guided evaluations as
the solver.

**consistency**: E|f(x_t, t) − f'(x_s, s)|², x_t on the straight line between bits of the data and noise, x_s one step of the
teacher's path further on the same grid of times, f' the student itself without gradient; from t = 0.8 on the sign of the
teacher's prediction takes the place of f'. The last step makes f = F there, each earlier one hands it on: f = F everywhere, as
far as points of the data's line lie where the paths do. It costs one guided evaluation, and errors add up from end to start.

With several evaluations (`consistency` in `bitdance/heads/diffusion/sampler.py`) bits are noised again: if f = F, then
t·F + (1 − t)·ε has the distribution of the paths at t, and f of it again that of their ends.

What f cannot know is averaged: where two ends are near, the mean of both has the sign of the likelier bit, and variety is lost.
`tests/test_few_steps.py` has the fixed points for distributions whose flow is exact.

K rows, P tokens per block, C bits per token. Sources: Song et al. 2023 (arXiv 2303.01469) for consistency; the path is regressed
as in Luhman and Luhman 2021 (arXiv 2101.02388).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdance.heads.diffusion.flow import interpolate, velocity_from_x
from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.heads.diffusion.sampler import DECIDED, SAMPLERS, time_grid
from lfq_tokenizer.binary import binarize_unchecked

OBJECTIVES = ("path", "consistency")
SOLVER = "dpmpp_2m"  # of the teacher's path
Predict = Callable[[Tensor, Tensor], Tensor]  # noisy bits (K,P,C), times (K,) or (1,) → predicted bits (K,P,C)


@dataclass(frozen=True)
class Path:
    """`points` at `times`, all of the solver's evaluations, and the bits where it ends."""

    times: list[float]
    points: list[Tensor]
    end_KPC: Tensor


def guided(head: BinaryDiffusionHead, cond_KPD: Tensor, uncond_KPD: Tensor, guidance_K11: Tensor) -> Predict:
    """The teacher's guided prediction; its conditions are embedded once."""
    embedded_RPW = head.prepare(torch.cat([cond_KPD, uncond_KPD]))

    def predict(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        time_W = head.net.time_embed(t_K)
        both = head.net(x_KPC, time_W if len(t_K) == 1 else time_W.repeat(2, 1), embedded_RPW)
        with_condition, without = both.chunk(2)
        return without + guidance_K11 * (with_condition - without)

    return predict


@torch.no_grad()
def solve(teacher: Predict, noise_KPC: Tensor, steps: int, time_shift: float = 1.0) -> Path:
    """The teacher's path from this noise."""
    times, points = [], []

    def velocity(x_KPC: Tensor, t: float) -> Tensor:
        times.append(t)
        points.append(x_KPC)
        return velocity_from_x(teacher(x_KPC, noise_KPC.new_full((1,), t)), x_KPC, t)

    end_KPC = SAMPLERS[SOLVER](velocity, noise_KPC, steps, _no_noise, time_shift)
    return Path(times, points, binarize_unchecked(end_KPC)[0])  # a NaN is in the points as well, and so in the loss


def path_loss(student: Predict, path: Path, place_K: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares over the bits (2K,P): at the start of the paths, then at the point of each row that `place_K`, in [0, 1),
    picks among the further ones; and the predictions (2K,P,C)."""
    number_K = 1 + (place_K * (len(path.times) - 1)).long()
    times_N = torch.tensor(path.times, dtype=place_K.dtype, device=place_K.device)
    further_KPC = torch.stack(path.points)[number_K, torch.arange(len(number_K), device=number_K.device)]
    start_K = torch.zeros_like(place_K)
    x_hat = student(torch.cat([path.points[0], further_KPC]), torch.cat([start_K, times_N[number_K]]))
    return (x_hat - path.end_KPC.repeat(2, 1, 1)).square().mean(dim=-1), x_hat


def consistency_loss(
    student: Predict, teacher: Predict, bits_KPC: Tensor, noise_KPC: Tensor, place_K: Tensor, steps: int, time_shift: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean squares over the bits (K,P), each row at the step of the grid that `place_K`, in [0, 1), picks; and predictions."""
    times_N = torch.tensor(time_grid(steps, time_shift, DECIDED), dtype=place_K.dtype, device=place_K.device)
    number_K = (place_K * len(times_N)).long()
    t_K, last_K = times_N[number_K], number_K == len(times_N) - 1
    s_K = times_N[(number_K + 1).clamp_max(len(times_N) - 1)]
    x_KPC = interpolate(bits_KPC, noise_KPC, t_K[:, None, None])
    with torch.no_grad():
        data_KPC = teacher(x_KPC, t_K)
        velocity = velocity_from_x(data_KPC, x_KPC, t_K[:, None, None])
        ahead_KPC = student(x_KPC + (s_K - t_K)[:, None, None] * velocity, s_K)
        target_KPC = torch.where(last_K[:, None, None], data_KPC.sign(), ahead_KPC)
    x_hat = student(x_KPC, t_K)
    return (x_hat - target_KPC).square().mean(dim=-1), x_hat


def few_steps_loss(
    objective: str,
    steps: int,
    head: BinaryDiffusionHead,
    teacher: Predict,
    cond_KPD: Tensor,
    bits_KPC: Tensor,
    noise_KPC: Tensor,
    place_K: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss of `head` by one of `OBJECTIVES` before the mean (R,P), and the share of bits that it has right in one evaluation
    from noise, NaN where the path is not solved. `bits_KPC` are those of the data; `place_K` in [0, 1] picks times."""
    embedded_KPW, shift = head.prepare(cond_KPD), head.config.time_shift
    place_K = place_K.clamp(0, 1 - 1e-6)

    def student(x_RPC: Tensor, t_R: Tensor) -> Tensor:
        embedded_RPW = embedded_KPW.repeat(len(x_RPC) // len(embedded_KPW), 1, 1)
        x_hat: Tensor = head.net(x_RPC, head.net.time_embed(t_R), embedded_RPW)
        return x_hat

    if objective == "consistency":
        loss_RP, _ = consistency_loss(student, teacher, bits_KPC.float(), noise_KPC, place_K, steps, shift)
        return loss_RP, loss_RP.new_tensor(math.nan)
    path = solve(teacher, noise_KPC, steps, shift)
    loss_RP, x_hat = path_loss(student, path, place_K)
    return loss_RP, ((x_hat[: len(place_K)] > 0) == (path.end_KPC > 0)).float().mean().detach()


def _no_noise() -> Tensor:
    raise AssertionError("the teacher's path takes no draw")
