"""What both networks of refinement are made of: the time's embedding and attention over all tokens.

B rows, L tokens, H heads, E width of a head, D hidden size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6
FREQUENCIES = 128


class RMSNorm(nn.RMSNorm):
    """RMS norm with a weight that computes in the dtype of its input, also under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class TimeEmbedding(nn.Module):
    """Share of kept labels t in [0, 1] → (B,D): [cos | sin] of t·10000^(-i/128), then a network of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time_B: Tensor) -> Tensor:
        steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=time_B.device)
        angle = time_B.float()[:, None] * torch.exp(-math.log(10000.0) * steps / FREQUENCIES)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


def heads_of(x_BLD: Tensor, heads: int) -> Tensor:
    """(B,L,D) → (B,H,L,E)."""
    return x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)
