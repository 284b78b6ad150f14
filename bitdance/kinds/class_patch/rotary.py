"""Positions of a class model's tokens: half of a head's pairs turn by the column, half by the row.

L sequence, E width of an attention head. Source: published class-conditional code.
"""

import torch
from torch import Tensor

from bitdance.networks.rotary import frequencies, turns_of


def turns(row_N: Tensor, col_N: Tensor, before: int, head_width: int) -> Tensor:
    """(before + N, E/2, 2): cosine and sine of the angle of every pair, at `before` positions that do not turn (class and
    query tokens) and at N picture tokens in the given order. Rows and columns of the grid count from 0 and stand at 1.5 on."""
    place_N2 = torch.stack([col_N, row_N], dim=-1).double() + 1.5
    place_L2 = torch.cat([place_N2.new_zeros(before, 2), place_N2])
    return turns_of((place_L2[:, :, None] * frequencies(head_width // 4)).flatten(1))
