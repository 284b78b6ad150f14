"""The 2-D sin-cos table added to image tokens: to the inputs at their own place, to hidden states at the place
predicted.

K rows (tokens), D channels.
"""

from functools import lru_cache

import torch
from torch import Tensor


def sincos_2d(row_K: Tensor, col_K: Tensor, dim: int, dtype: torch.dtype = torch.float32, side: int | None = None) -> Tensor:
    """(K, dim): the first half encodes the column, the second half the row, each `[sin | cos]` of `pos /
    10000^(k/(dim/4))`.

    `row_K`, `col_K`: integer places in the token grid, from 0, not rescaled with the resolution. All are below `side`, which
    whoever laid the grid out knows; without it the largest is read from their device, which then has to end its work first.
    Computed in float64 on the CPU, then cast. Raises ValueError if 4 does not divide `dim`.
    Source: published checkpoints (numbers of case `pos2d`).
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width divisible by 4, got {dim}")
    if row_K.shape != col_K.shape:
        raise ValueError(f"rows and columns must pair up, got shapes {tuple(row_K.shape)} and {tuple(col_K.shape)}")
    if row_K.numel() == 0:
        return torch.empty(*row_K.shape, dim, dtype=dtype, device=row_K.device)
    if side is None:
        side = int(torch.maximum(row_K.max(), col_K.max())) + 1
    table_SE = _sincos_1d(1 << (side - 1).bit_length(), dim // 2, dtype, row_K.device)  # few table sizes, reused
    return torch.cat([table_SE[col_K], table_SE[row_K]], dim=-1)


@lru_cache(maxsize=32)
def _sincos_1d(side: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(side, width): `[sin | cos]` of every place 0 … side-1."""
    with torch.inference_mode(False):  # the cached table must also serve a later training step
        frequency_F = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
        angle_SF = torch.arange(side, dtype=torch.float64)[:, None] * frequency_F
        return torch.cat([angle_SF.sin(), angle_SF.cos()], dim=-1).to(device=device, dtype=dtype)
