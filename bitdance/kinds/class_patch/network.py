"""The transformer: RMS norms, bias-free attention with 2-D rotary positions, SwiGLU. Parameter names of the published code.

B rows, L new positions, S positions so far, H heads, E width of a head, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdance.heads.attend import attend
from bitdance.networks.memory import Memory
from bitdance.networks.rotary import rotate

NORM_EPS = 1e-6
_MULTIPLE = 256  # the SwiGLU's width is a multiple of this


class Attention(nn.Module):
    """Attention of every position to those that the mask allows, or to all that are there (no mask)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, turns_LG2: Tensor, mask: Tensor | None, memory: Memory | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.wqkv(x_BLD).chunk(3, dim=-1))
        q, k = rotate(q, turns_LG2), rotate(k, turns_LG2)
        if memory is not None:
            k, v = memory.add(k, v)
        return self.wo(attend(q, k, v, mask))


class SwiGLU(nn.Module):
    """silu(a)·b with (a, b) = W1 x, then W2."""

    def __init__(self, width: int, inner: int, out: int, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 2 * inner, bias=bias)
        self.w2 = nn.Linear(inner, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


class Layer(nn.Module):
    """Normed attention and normed SwiGLU, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner = -(-(8 * width // 3) // _MULTIPLE) * _MULTIPLE
        self.attention = Attention(width, heads)
        self.feed_forward = SwiGLU(width, inner, width, bias=False)
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.ffn_norm = nn.RMSNorm(width, eps=NORM_EPS)

    def forward(self, x_BLD: Tensor, turns_LG2: Tensor, mask: Tensor | None, memory: Memory | None = None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), turns_LG2, mask, memory)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fresh weights of linear layers and embeddings in `module`: normal of width 0.02, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(std=0.02, generator=generator)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()
