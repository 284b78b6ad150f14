"""What is drawn for the pictures of a next-scale model.

B pictures, T bits of a token, K scales of (h_k, w_k).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdance.kinds.next_scale.config import NextScaleConfig
from stages.data.shards import Sample
from stages.recipes.pictures.feed import PictureFeed


@dataclass(frozen=True)
class ScaleNoise:
    """`dropped_B`: whose condition is left out; `kept_D2B`: the branches of each block, 0 or 1 / share of those that stay;
    `flipped`: of bits, which ones of each scale are turned (B,T,h_k,w_k), as far as any may be."""

    dropped_B: Tensor
    kept_D2B: Tensor
    flipped: tuple[Tensor, ...]

    def to(self, device: torch.device | str) -> "ScaleNoise":
        """The same on a device."""
        return ScaleNoise(self.dropped_B.to(device), self.kept_D2B.to(device), tuple(one.to(device) for one in self.flipped))


@dataclass(frozen=True)
class ScaleDraws:
    """See `pictures.feed.Noise`. In validation nothing is left out and nothing turned.

    Bitwise self-correction turns each bit of a scale with probability q, which is drawn for each picture and scale from 0 to
    `flips` in hundredths. Turning bits of the last scale would have no effect.
    # OURS: q is drawn for each picture, not once for a batch, so that a sample does not depend on its neighbours.
    Source: Infinity paper (arXiv 2412.04431), bitwise self-correction; public code for how q is drawn.
    """

    shape: NextScaleConfig

    def draw(self, training: bool, source: torch.Generator) -> ScaleNoise:
        c = self.shape
        kept_D2B, flipped = torch.ones(c.depth, 2, 1), list[Tensor]()
        if not training:
            return ScaleNoise(torch.zeros(1, dtype=torch.bool), kept_D2B, ())
        dropped_B = torch.rand(1, generator=source) < c.drop
        if c.drop_path:
            share_D = 1 - torch.linspace(0, c.drop_path, c.depth)
            kept_D2B = (torch.rand(c.depth, 2, 1, generator=source) < share_D[:, None, None]) / share_D[:, None, None]
        if c.tokens == "bits" and c.flips:
            for h, w in c.sides[: min(c.flip_scales, len(c.sides) - 1)]:
                q = 0.01 * int(torch.randint(int(100 * c.flips) + 1, (), generator=source))
                flipped.append(torch.rand(1, c.latents, h, w, generator=source) < q)
        return ScaleNoise(dropped_B, kept_D2B, tuple(flipped))

    def joined(self, noise: Sequence[ScaleNoise]) -> ScaleNoise:
        return ScaleNoise(
            torch.cat([one.dropped_B for one in noise]),
            torch.cat([one.kept_D2B for one in noise], dim=2),
            tuple(torch.cat(scale) for scale in zip(*(one.flipped for one in noise), strict=True)),
        )


class ScaleFeed(PictureFeed):
    """See `PictureFeed`; of pictures alone."""

    def _tokens(self, sample: Sample, epoch: float = 0.0, source: torch.Generator | None = None) -> Tensor:
        if sample.picture is None:
            raise ValueError(f"sample {sample.key} holds bits; a next-scale model trains on shards of pictures")
        return super()._tokens(sample, epoch, source)
