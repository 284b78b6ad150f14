"""Group-wise entropy of lookup-free codes, without the table of codes.

Per group of k channels the codes are all sign vectors c, with logits `2⟨z, c⟩ / T`. Because the logits are a sum over channels,
the softmax is a product of one Bernoulli per channel with logit `a_i = 4 z_i / T`:

    entropy of one sample   = Σ_i H(a_i),   H(a) = softplus(a) − a·sigmoid(a)          closed form for every k
    mean probability of c   = mean_n Π_i P(c_i | a_ni)                                  a matrix product of two half-groups

so the 2^k codes appear only in the mean, and the work per sample is 2·2^(k/2) numbers instead of 2^k.
Source: BitDance paper (arXiv 2602.14041), tokenizer section; `groups = 1` is LFQ, `groups = dim` is BSQ.
"""

from contextlib import AbstractContextManager, nullcontext
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


class _MeanOfProducts(torch.autograd.Function):
    """(q,G,K), (r,G,K) → mean over K of the products (G,q,r), in the inputs' precision both ways, even inside autocast."""

    @staticmethod
    def forward(ctx: Any, high_qGK: Tensor, low_rGK: Tensor) -> Tensor:
        ctx.save_for_backward(high_qGK, low_rGK)
        with without_autocast(high_qGK.device):
            return torch.einsum("qgk,rgk->gqr", high_qGK, low_rGK) / high_qGK.shape[2]

    @staticmethod
    def backward(ctx: Any, grad_Gqr: Tensor) -> tuple[Tensor, Tensor]:
        high_qGK, low_rGK = ctx.saved_tensors
        with without_autocast(grad_Gqr.device):
            grad = grad_Gqr / high_qGK.shape[2]
            return torch.einsum("gqr,rgk->qgk", grad, low_rGK), torch.einsum("gqr,qgk->rgk", grad, high_qGK)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inputs keep their precision inside; nothing to do on a device that has no autocast."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


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


def _sign_code_probabilities(logits_kGK: Tensor) -> Tensor:
    """Probability of each of the 2^k sign codes, (2^k, G, K); channel 0 is the lowest bit of the code's index."""
    table_QGK, *more = torch.sigmoid(torch.stack([-logits_kGK, logits_kGK], dim=1))
    for pair_2GK in more:
        table_QGK = (pair_2GK[:, None] * table_QGK).flatten(0, 1)
    return table_QGK


def group_entropy(z_BChw: Tensor, groups: int, temperature: float = 0.01, pool_groups: bool = True) -> tuple[Tensor, Tensor]:
    """(mean entropy per sample and group, entropy of the mean probability), two scalars in nats.

    The mean probability pools batch, positions, processes and, with `pool_groups`, the groups (as the published tokenizers do);
    without it each group has its own mean and the second value is the average of the groups' entropies.
    Computed in float32 whatever the input and the autocast state. On several processes both values describe the union of all
    processes' samples.
    """
    check_groups(z_BChw.shape[1], groups)
    with without_autocast(z_BChw.device):
        return _group_entropy(z_BChw.float() * (4.0 / temperature), groups, pool_groups)


def _group_entropy(logits_BChw: Tensor, groups: int, pool_groups: bool) -> tuple[Tensor, Tensor]:
    k = logits_BChw.shape[1] // groups
    logits_kGK = logits_BChw.unflatten(1, (groups, k)).permute(2, 1, 0, 3, 4).flatten(2)
    if pool_groups:  # the groups are further samples of one group
        logits_kGK = logits_kGK.flatten(1)[:, None]
    per_sample = bernoulli_entropy(logits_kGK).sum(dim=0).mean()

    if k == 1:
        up_G1 = torch.sigmoid(logits_kGK[0]).mean(dim=1, keepdim=True)
        mean_GQ = torch.cat([1 - up_G1, up_G1], dim=1)
    else:
        low_qGK, high_qGK = (_sign_code_probabilities(half) for half in logits_kGK.tensor_split([k // 2]))
        mean_GQ = _MeanOfProducts.apply(high_qGK, low_qGK).flatten(1)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        world = dist.get_world_size()
        mean_GQ = _SumOverProcesses.apply(mean_GQ) / world
        per_sample = _SumOverProcesses.apply(per_sample) / world
    # OFFICIAL: the recorded values hold this epsilon inside the logarithm (0.0026 nats at 8 bits per group).
    of_mean = -(mean_GQ * torch.log(mean_GQ + LOG_EPSILON)).sum(dim=1).mean()
    return per_sample, of_mean
