"""The plan of next-patch prediction: which grid positions form block m, and in which order.

B batch, C bits per token, h w token grid, p patch side, N = h·w tokens.
"""

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor


def patch_side(block_size: int) -> int:
    """Tokens along a side of a patch of `block_size` tokens. ValueError unless the patch is square."""
    if isqrt(block_size) ** 2 != block_size:
        raise ValueError(f"parallel_num = {block_size}; a block is a square patch: 1, 4, 16, 64, …")
    return isqrt(block_size)


@dataclass(frozen=True)
class PatchPlan:
    """Patch-wise raster order of an h × w token grid in p × p patches: `(i p1) (j p2) -> (i j p1 p2)`.

    Source: BitDance paper, arXiv 2602.14041, next-patch diffusion. Raises ValueError if p does not divide h and w.
    """

    h: int
    w: int
    p: int

    def __post_init__(self) -> None:
        if min(self.h, self.w, self.p) < 1:
            raise ValueError(f"grid {self.h}x{self.w} with patch side {self.p}: all three must be at least 1")
        if self.h % self.p or self.w % self.p:
            raise ValueError(
                f"grid {self.h}x{self.w} cannot be cut into {self.p}x{self.p} patches; both sides must be multiples of {self.p}"
            )

    @property
    def block_size(self) -> int:
        """P, tokens predicted per step."""
        return self.p * self.p

    @property
    def num_blocks(self) -> int:
        """M, steps per image."""
        return self.h * self.w // self.block_size

    def order(self, x_BChw: Tensor) -> Tensor:
        """(B,C,h,w) grid → (B,N,C) tokens in the order in which they are predicted."""
        self._check(x_BChw.shape[-2:] == (self.h, self.w) and x_BChw.ndim == 4, x_BChw, f"(B,C,{self.h},{self.w})")
        B, C = x_BChw.shape[:2]
        p = self.p
        x = x_BChw.reshape(B, C, self.h // p, p, self.w // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(B, self.h * self.w, C)

    def unorder(self, x_BNC: Tensor) -> Tensor:
        """(B,N,C) tokens in prediction order → (B,C,h,w) grid; the inverse of `order`."""
        self._check(x_BNC.ndim == 3 and x_BNC.shape[1] == self.h * self.w, x_BNC, f"(B,{self.h * self.w},C)")
        B, _, C = x_BNC.shape
        p = self.p
        x = x_BNC.reshape(B, self.h // p, self.w // p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, self.h, self.w)

    def coordinates(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(row_N, col_N), int64, of every token in prediction order."""
        grid_2hw = torch.stack(torch.meshgrid(torch.arange(self.h), torch.arange(self.w), indexing="ij"))
        row_N, col_N = self.order(grid_2hw[None])[0].to(device).unbind(-1)
        return row_N.contiguous(), col_N.contiguous()

    def _check(self, holds: bool, x: Tensor, expected: str) -> None:
        if not holds:
            raise ValueError(f"{self} expects a tensor of shape {expected}, got {tuple(x.shape)}")
