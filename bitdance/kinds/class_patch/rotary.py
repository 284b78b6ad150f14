"""2-D rotary positions: pairs of neighbouring channels turn, half of the pairs by the column, half by the row.

L sequence, E width of an attention head, B rows, H heads. Source: published class-conditional code.
"""

import torch
from torch import Tensor

BASE = 10000.0


def turns(row_N: Tensor, col_N: Tensor, before: int, head_width: int) -> Tensor:
    """(before + N, E/2, 2): cosine and sine of the angle of every pair, at `before` positions that do not turn (class and
    query tokens) and at N picture tokens in the given order. Rows and columns of the grid count from 0 and stand at 1.5 on."""
    frequency_F = BASE ** (-torch.arange(0, head_width // 4, dtype=torch.float64) * 4 / head_width)
    place_N2 = torch.stack([col_N, row_N], dim=-1).double() + 1.5
    place_L2 = torch.cat([place_N2.new_zeros(before, 2), place_N2])
    angle_LG = (place_L2[:, :, None] * frequency_F).flatten(1)
    return torch.stack([angle_LG.cos(), angle_LG.sin()], dim=-1).float()


def rotate(x_BHLE: Tensor, turns_LG2: Tensor) -> Tensor:
    """Queries or keys with every pair (2i, 2i+1) turned by its angle; computed in float32 at least, returned in x's dtype."""
    pair = (x_BHLE if x_BHLE.dtype == torch.float64 else x_BHLE.float()).unflatten(-1, (-1, 2))
    even, odd = pair.unbind(-1)
    cos, sin = turns_LG2.to(pair.dtype).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x_BHLE.dtype)
