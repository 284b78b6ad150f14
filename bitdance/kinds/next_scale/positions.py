"""Rotary positions of the tokens of all scales: every scale lies stretched over the largest grid of its ratio.

L tokens of all scales, E width of an attention head. Source: Infinity paper (arXiv 2412.04431); public code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitdance.kinds.next_scale.schedule import SCHEDULES, ratio_of
from bitdance.networks.rotary import frequencies, turns_of
from lfq_tokenizer.scales import Side


def places(sides: Sequence[Side]) -> tuple[Tensor, Tensor]:
    """Row (L,) and column (L,) of every token, on the grid of the last scale of the one-megapixel schedule of its ratio."""
    H, W = SCHEDULES[ratio_of(sides[-1])][-1]
    rows, columns = [], []
    for h, w in sides:
        row, column = stretched(h, H), stretched(w, W)
        rows.append(row[:, None].expand(h, w).flatten())
        columns.append(column[None].expand(h, w).flatten())
    return torch.cat(rows), torch.cat(columns)


def stretched(side: int, largest: int) -> Tensor:
    """0 … side - 1 as places among `largest`, halves to even; in float32, whose rounding the published tables have."""
    return (torch.arange(side, dtype=torch.float32) * (largest / side)).round().long()


def scale_turns(sides: Sequence[Side], head_width: int) -> Tensor:
    """(L, E/2, 2): the first half of a head's pairs turns by the row, the second by the column."""
    row_L, column_L = places(sides)
    pace = frequencies(head_width // 4)
    return turns_of(torch.cat([row_L.double()[:, None] * pace, column_L.double()[:, None] * pace], dim=1))
