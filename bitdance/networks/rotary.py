"""Rotary positions: pairs of neighbouring channels turn by an angle that follows from the position.

L positions, E width of an attention head, B rows, H heads.
"""

import torch
from torch import Tensor

BASE = 10000.0


def frequencies(count: int) -> Tensor:
    """(count,) float64: how far pair i turns per unit of the position."""
    return BASE ** (-torch.arange(count, dtype=torch.float64) / count)


def turns_of(angle_LG: Tensor) -> Tensor:
    """Angles of every pair at every position → (L, E/2, 2): their cosine and sine, float32."""
    return torch.stack([angle_LG.cos(), angle_LG.sin()], dim=-1).float()


def rotate(x_BHLE: Tensor, turns_LG2: Tensor) -> Tensor:
    """Queries or keys with every pair (2i, 2i+1) turned by its angle; computed in float32 at least, returned in x's dtype.
    `turns_LG2` may have a dimension (B,1) in front."""
    pair = (x_BHLE if x_BHLE.dtype == torch.float64 else x_BHLE.float()).unflatten(-1, (-1, 2))
    even, odd = pair.unbind(-1)
    cos, sin = turns_LG2.to(pair.dtype).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x_BHLE.dtype)
