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
    """Queries or keys with every pair (2i, 2i+1), as one complex number, turned by its angle. Computed in float32 at least,
    returned in x's dtype. `turns_LG2` may have a dimension (B,1) in front."""
    x = x_BHLE if x_BHLE.dtype == torch.float64 else x_BHLE.float()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.view_as_complex(turns_LG2.to(x.dtype).contiguous())
    return torch.view_as_real(turned).flatten(-2).to(x_BHLE.dtype)
