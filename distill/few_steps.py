"""A head that makes the bits of a block in one, two or four evaluations: what it is taught.

A head predicts the bits x̂(x_t, t) of a noisy block. With guidance g the teacher's prediction is x̂_g = x̂_u + g·(x̂_c − x̂_u), and

    dx/dt = (x̂_g(x, t) − x) / (1 − t)        from normal noise z at t = 0

leads every z to an end F(z) in {−1,+1}^(P·C). F turns noise into whole blocks: what ties the bits of a block to one another is in
it. The student f is the same network, called once; it sees a point, a time and the condition with the prompt or class alone, so
guidance costs it nothing; where one student is to serve a range of g, g is one more input of it. It learns its first guess, and
to mend it:

    E|f(z, 0) − F(z)|²  +  E|f(x, t) − F(z)|²,    x = (1 − t)·z + t·f(z, 0) without gradient, t random

The end is a function of z, so f(z, 0) = F(z) is the minimiser of the first term, up to the teacher's solver. Where a network
cannot follow F, which jumps from corner to corner, it gives the mean of the ends nearby, and bits with their signs may belong to
different ends. x shows such a guess beside its z, so the second evaluation can settle on one of them: both terms have the same
minimiser, and the further evaluations bring a network of finite size nearer to it. The sampler "direct"
(`bitdance/heads/diffusion/sampler.py`) visits just these points.

What was tried and left out (figures in dev/LOG.md): points of the teacher's path in place of x, points of the line from z to F(z)
(rectified flow, arXiv 2209.03003) and self-consistency of neighbouring points (arXiv 2303.01469). They learn the first guess as
well, but with guidance their further evaluations lead away from the teacher's ends, for a guided path lies elsewhere than the
line that few evaluations take.

`tests/test_few_steps.py` has the claims for distributions whose flow is exact. K rows, P tokens per block, C bits per token.
Source: the end of the path is regressed as in Luhman and Luhman 2021 (arXiv 2101.02388). # OURS: the guesses that are mended.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitdance.heads.diffusion.flow import interpolate, velocity_from_x
from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.heads.diffusion.sampler import SAMPLERS
from lfq_tokenizer.binary import binarize_unchecked

SOLVER = "dpmpp_2m"  # of the teacher's path
Predict = Callable[[Tensor, Tensor], Tensor]  # noisy bits (K,P,C), times (K,) or (1,) → predicted bits (K,P,C)


def guided(head: BinaryDiffusionHead, cond_KPD: Tensor, uncond_KPD: Tensor, guidance_K11: Tensor) -> Predict:
    """The teacher's guided prediction, on the device of the conditions, which are embedded once."""
    if head.net.cond_embed.weight.device != cond_KPD.device:
        head.to(cond_KPD.device)
    embedded_RPW = head.prepare(torch.cat([cond_KPD, uncond_KPD]))

    def predict(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        time_W = head.net.time_embed(t_K)
        both = head.net(x_KPC, time_W if len(t_K) == 1 else time_W.repeat(2, 1), embedded_RPW)
        with_condition, without = both.chunk(2)
        return without + guidance_K11 * (with_condition - without)

    return predict


@torch.no_grad()
def ends(teacher: Predict, noise_KPC: Tensor, steps: int, time_shift: float = 1.0) -> Tensor:
    """F of this noise, (K,P,C) in {-1,+1}: `steps` + 1 evaluations of the teacher. A NaN becomes -1; it is in the student's
    condition as well, and so in the loss."""

    def velocity(x_KPC: Tensor, t: float) -> Tensor:
        return velocity_from_x(teacher(x_KPC, noise_KPC.new_full((1,), t)), x_KPC, t)

    return binarize_unchecked(SAMPLERS[SOLVER](velocity, noise_KPC, steps, _no_noise, time_shift))[0]


def drawn_guidance(noise_KPC: Tensor, low: float, high: float) -> Tensor:
    """A guidance scale for each row (K,), uniform from `low` to `high`: the decimals of the row's first number from the fourth
    on, which say nothing of its size. So the scale is a function of the sample, like all that is random about it."""
    return low + (high - low) * (1000 * noise_KPC[:, 0, 0].abs()).frac()


def few_steps_loss(
    head: BinaryDiffusionHead,
    cond_KPD: Tensor,
    noise_KPC: Tensor,
    end_KPC: Tensor,
    time_K: Tensor,
    guidance_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squares over the bits (2K,P), of the first guesses and then of the mended ones at the times (K,), and the share of
    bits of the first guesses that have the sign of the end. `guidance_K` for a head that takes it as an input."""
    embedded_KPW = head.prepare(cond_KPD)
    if guidance_K is not None:
        embedded_KPW = embedded_KPW + head.embed_guidance(guidance_K)

    def student(x_KPC: Tensor, t_K: Tensor) -> Tensor:
        x_hat: Tensor = head.net(x_KPC, head.net.time_embed(t_K), embedded_KPW)
        return x_hat

    return loss_of(student, noise_KPC, end_KPC, time_K)


def loss_of(student: Predict, noise_KPC: Tensor, end_KPC: Tensor, time_K: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any student."""
    first_KPC = student(noise_KPC, torch.zeros_like(time_K))
    line_KPC = interpolate(first_KPC.detach(), noise_KPC, time_K[:, None, None])
    mended_KPC = student(line_KPC, time_K)
    loss_RP = torch.cat([(guess - end_KPC).square().mean(dim=-1) for guess in (first_KPC, mended_KPC)])
    return loss_RP, ((first_KPC.detach() > 0) == (end_KPC > 0)).float().mean()


def _no_noise() -> Tensor:
    raise AssertionError("the teacher's path takes no draw")
