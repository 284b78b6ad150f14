"""Heads that diffusion is compared with: a logit for each bit of a token, or one for each of its 2^C values.

What a step costs is one matrix. A logit for each bit takes the bits of a token, and the tokens of a block, as independent of one
another; one for each value takes the tokens of a block so. K, R rows, P tokens per block, C bits, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdance.heads.diffusion.settings import Sampling

KINDS = ("bits", "values")
MOST_BITS = 16  # of a token whose values have a logit each


class DiscreteHead(nn.Module):
    """See the module's docstring. ValueError for values of too many bits."""

    def __init__(self, kind: str, bits: int, width: int) -> None:
        super().__init__()
        if kind == "values" and bits > MOST_BITS:
            raise ValueError(
                f"head_kind = 'values' for {bits} bits per token; at most {MOST_BITS} bits have a logit for each value"
            )
        self.kind, self.bits = kind, bits
        self.out = nn.Linear(width, bits if kind == "bits" else 2**bits)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights."""
        self.out.weight.normal_(std=0.02, generator=generator)
        self.out.bias.zero_()

    def forward(self, cond: Tensor) -> Tensor:
        """Conditions (…,D) → logits (…,C) or (…,2^C), float32."""
        return self.out(cond).float()

    def loss_at(self, target_KPC: Tensor, cond_KPD: Tensor) -> Tensor:
        """Cross-entropy of each token in nats (K,P): the mean over its bits, or of its value over its bits, so that both are nats
        per bit."""
        logits = self(cond_KPD)
        if self.kind == "bits":
            return F.softplus(-target_KPC * logits).mean(dim=-1)
        return F.cross_entropy(logits.movedim(-1, 1), number_of(target_KPC), reduction="none") / self.bits


class DiscreteSampler:
    """Stands where `BlockSampler` does: conditions and normal noise → bits. Steps and solver mean nothing here."""

    def __init__(self, head: DiscreteHead) -> None:
        self.head = head

    @torch.no_grad()
    def __call__(self, cond_RPD: Tensor, noise_SBPC: Tensor, sampling: Sampling, steps: int) -> Tensor:
        """Bits (B,P,C) in {-1,+1} of one block, float32. The first noise of a token is what decides."""
        logits, z_BPC = self.head(cond_RPD), noise_SBPC[0]
        if len(logits) > len(z_BPC):
            with_condition, without = logits.chunk(2)
            logits = without + sampling.guidance * (with_condition - without)
        if self.head.kind == "bits":
            threshold_BPC = torch.special.log_ndtr(z_BPC) - torch.special.log_ndtr(-z_BPC)  # the logit of a uniform number
            return torch.where(logits > threshold_BPC, 1.0, -1.0)
        share_BPV = logits.double().softmax(dim=-1).cumsum(dim=-1)
        uniform_BP1 = torch.special.ndtr(z_BPC[..., :1].double()) * share_BPV[..., -1:]
        return bits_of(torch.searchsorted(share_BPV, uniform_BP1).squeeze(-1).clamp_max(share_BPV.shape[-1] - 1), self.head.bits)


def number_of(bits: Tensor) -> Tensor:
    """Bits (…,C) in {-1,+1} → whole numbers (…), the first bit the lowest."""
    return ((bits > 0).long() << torch.arange(bits.shape[-1], device=bits.device)).sum(dim=-1)


def bits_of(number: Tensor, C: int) -> Tensor:
    """The reverse, float32."""
    return 2.0 * ((number[..., None] >> torch.arange(C, device=number.device)) & 1) - 1
