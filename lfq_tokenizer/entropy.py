"""Group-wise entropy of lookup-free codes, without the table of codes.

Per group of k channels the codes are all sign vectors c, with logits `2⟨z, c⟩ / T`. Because the logits are a sum over channels,
the softmax is a product of one Bernoulli per channel with logit `a_i = 4 z_i / T`:

    entropy of one sample   = Σ_i H(a_i),   H(a) = softplus(a) − a·sigmoid(a)          closed form for every k
    mean probability of c   = mean_n Π_i P(c_i | a_ni)                                  a matrix product of two half-groups

so the 2^k codes appear only in the mean, and the work per sample is 2·2^(k/2) numbers instead of 2^k.
Source: BitDance paper (arXiv 2602.14041), tokenizer section; `groups = 1` is LFQ, `groups = dim` is BSQ.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

MAX_BITS_PER_GROUP = 18
LOG_EPSILON = 1e-5


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is summed over processes too; data-parallel averaging divides by their number again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def check_groups(dim: int, groups: int) -> None:
    """ValueError unless `groups` divides `dim` into groups of at most 18 bits (2^18 codes)."""
    allowed = [g for g in range(1, dim + 1) if dim % g == 0 and dim // g <= MAX_BITS_PER_GROUP]
    if groups not in allowed:
        raise ValueError(
            f"groups = {groups} for {dim} bits; allowed are {allowed} "
            f"(divisors of {dim} with at most 2^{MAX_BITS_PER_GROUP} codes per group)"
        )


def bernoulli_entropy(logit: Tensor) -> Tensor:
    """Entropy in nats of a Bernoulli with this logit, elementwise; at most log 2."""
    return F.softplus(logit) - logit * torch.sigmoid(logit)


def _sign_code_probabilities(logits_Kk: Tensor) -> Tensor:
    """Probability of each of the 2^k sign codes, (K, 2^k); channel 0 is the lowest bit of the code's index."""
    table = torch.ones_like(logits_Kk[:, :1])
    for column in logits_Kk.unbind(dim=1):
        up = torch.sigmoid(column)[:, None]
        down = torch.sigmoid(-column)[:, None]
        table = torch.cat([table * down, table * up], dim=1)
    return table


def group_entropy(z_BChw: Tensor, groups: int, temperature: float = 0.01, pool_groups: bool = True) -> tuple[Tensor, Tensor]:
    """(mean entropy per sample and group, entropy of the mean probability), two scalars in nats.

    The mean probability pools batch, positions, processes and, with `pool_groups`, the groups (as the published tokenizers do);
    without it each group has its own mean and the second value is the average of the groups' entropies.
    Computed in float32 whatever the input. On several processes both values describe the union of all processes' samples.
    """
    B, C, h, w = z_BChw.shape
    check_groups(C, groups)
    k = C // groups
    logits_GKk = (z_BChw.float() * (4.0 / temperature)).view(B, groups, k, h * w).permute(1, 0, 3, 2).reshape(groups, -1, k)
    per_sample = bernoulli_entropy(logits_GKk).sum(dim=-1).mean()

    half = k // 2
    means = []
    for logits_Kk in logits_GKk.unbind(0):
        if k == 1:
            up = torch.sigmoid(logits_Kk[:, 0]).mean()
            means.append(torch.stack([1 - up, up]))
        else:
            low = _sign_code_probabilities(logits_Kk[:, :half])
            high = _sign_code_probabilities(logits_Kk[:, half:])
            means.append((high.T @ low).flatten() / len(logits_Kk))
    mean_GQ = torch.stack(means)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        world = dist.get_world_size()
        mean_GQ = _SumOverProcesses.apply(mean_GQ) / world
        per_sample = _SumOverProcesses.apply(per_sample) / world
    if pool_groups:
        mean_GQ = mean_GQ.mean(dim=0, keepdim=True)
    # OFFICIAL: the recorded values hold this epsilon inside the logarithm (0.0026 nats at 8 bits per group).
    of_mean = -(mean_GQ * torch.log(mean_GQ + LOG_EPSILON)).sum(dim=1).mean()
    return per_sample, of_mean
