"""The transformer: RMS norms, bias-free attention with 2-D rotary positions, SwiGLU. Parameter names of the published code.

B rows, L new positions, S positions so far, H heads, E width of a head, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdance.networks.rotary import rotate

NORM_EPS = 1e-6
_MULTIPLE = 256  # the SwiGLU's width is a multiple of this


class Memory:
    """Keys and values of one layer in room that is taken once; what attention gets is a view of the filled part."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._kept: tuple[Tensor, Tensor] | None = None

    def add(self, key_BHLE: Tensor, value_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """New positions → all positions so far (B,H,S,E)."""
        if self._kept is None:
            B, H, _, E = key_BHLE.shape
            self._kept = key_BHLE.new_empty(B, H, self.capacity, E), value_BHLE.new_empty(B, H, self.capacity, E)
        start, self.length = self.length, self.length + key_BHLE.shape[2]
        assert self.length <= self.capacity, f"{self.length} positions in a memory for {self.capacity}"
        for kept, new in zip(self._kept, (key_BHLE, value_BHLE)):
            kept[:, :, start : self.length] = new
        keys, values = (kept[:, :, : self.length] for kept in self._kept)
        return keys, values

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        if self._kept is not None:
            keys, values = (kept[list(rows)] for kept in self._kept)
            self._kept = keys, values


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
        return self.wo(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


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
