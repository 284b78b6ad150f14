"""Residual quantisation over scales: each scale says what the ones before it, enlarged and summed, still lack.

    F = latents, A = 0;  for each scale k:  tokens_k = quantise(shrink(F - A)),  A = A + enlarge(code of tokens_k)

By the nearest code of a table, whose enlarged code passes a shared convolution (VAR), or by signs (Infinity). Both quantisers
have the same methods. K scales of (h_k, w_k), the last as large as the latents; B pictures, Z latents per position.
Sources: VAR paper (arXiv 2404.02905), multi-scale VQVAE; Infinity paper (arXiv 2412.04431), multi-scale residual quantiser; both
public codes for how sizes change.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer import limits
from lfq_tokenizer.binary import binarize
from lfq_tokenizer.quantizer import QuantizerLosses

Side: TypeAlias = tuple[int, int]


def squares(sides: Any) -> list[Side]:
    """Sides of squares, or pairs (h, w), as pairs. ValueError for anything else, and for sides beyond reason."""
    pairs = [(one, one) if isinstance(one, int) else one for one in sides] if isinstance(sides, list | tuple) else [sides]
    for pair in pairs:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(side) is int for side in pair)
        if not whole or not all(1 <= side <= limits.WIDTH for side in pair):
            raise ValueError(f"sides = {sides!r:.60}; numbers or pairs (height, width) from 1 to {limits.WIDTH} are allowed")
    return [(h, w) for h, w in pairs]


def shared_index(K: int, n: int) -> list[int]:
    """Which of n shared convolutions each of K scales uses: the one whose tick is nearest to k/(K-1), the first where two are. In
    float64, whose rounding decides the published ties (K = 10, n = 4: 0 0 1 1 1 2 2 3 3 3)."""
    low = 1 / 3 / n if n == 4 else 1 / 2 / n
    ticks = np.linspace(low, 1 - low, n)
    return [int(np.argmin(np.abs(ticks - (k / (K - 1) if K > 1 else 0.0)))) for k in range(K)]


class ScaleQuantizer(nn.Module):
    """What both quantisers share. `input_mode` is how the sum becomes a transformer's input."""

    input_mode = "area"

    def quantise(self, small_BZhw: Tensor) -> Tensor:
        """What is lacking at one scale → its tokens."""
        raise NotImplementedError

    def code(self, tokens: Tensor) -> Tensor:
        """Tokens of one scale → their code (B,Z,h_k,w_k)."""
        raise NotImplementedError

    def enlarged(self, code_BZhw: Tensor, k: int, K: int, size: Side) -> Tensor:
        """The code of scale k of K as it is added to the sum, of the size of the latents."""
        raise NotImplementedError

    def full(self, sides: Sequence[Side]) -> Side:
        """The (h, w) of the latents of the last of these scales."""
        return sides[-1]

    def encode(self, latents_BZhw: Tensor, sides: Sequence[Side]) -> list[Tensor]:
        """Latents → tokens of every scale. ValueError where the last scale is not as large as the latents."""
        return self.teach(latents_BZhw, sides)[0]

    def teach(
        self, latents_BZhw: Tensor, sides: Sequence[Side], flipped: Sequence[Tensor | None] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Latents → what a transformer learns of them: tokens of every scale, and its input (B,Z,h_k,w_k) before each but the
        first.

        `flipped` (of bits): which bits of a scale are turned before they are added to the sum, None or nothing for none. What
        later scales must say then makes up for them: bitwise self-correction of Infinity.
        """
        size, full = (latents_BZhw.shape[2], latents_BZhw.shape[3]), self.full(sides)
        if size != tuple(full):
            raise ValueError(f"the last scale is {full[0]}×{full[1]}, the latents are {size[0]}×{size[1]}; they must be equal")
        rest, total = latents_BZhw.float(), torch.zeros_like(latents_BZhw.float())
        targets, inputs = list[Tensor](), list[Tensor]()
        for k in range(len(sides)):
            tokens = self.quantise(self.shrunk(rest, sides, k))
            targets.append(tokens)
            turned = flipped[k] if k < len(flipped) else None
            if turned is not None:
                tokens = torch.where(turned, -tokens, tokens)
            enlarged = self.enlarged(self.code(tokens), k, len(sides), full)
            rest, total = rest - enlarged, total + enlarged
            if k + 1 < len(sides):
                inputs.append(self.input(total, sides[k + 1]))
        return targets, inputs

    def shrunk(self, rest_BZhw: Tensor, sides: Sequence[Side], k: int) -> Tensor:
        """What is still lacking, as large as the latents of scale k."""
        return rest_BZhw if k == len(sides) - 1 else F.interpolate(rest_BZhw, self.full(sides[: k + 1]), mode="area")

    def sums(self, tokens: Sequence[Tensor], sides: Sequence[Side]) -> list[Tensor]:
        """Tokens of the first scales of `sides` → the sum after each of them (B,Z,h_K,w_K)."""
        total: Tensor | float = 0.0
        found = []
        for k, one in enumerate(tokens):
            total = total + self.enlarged(self.code(one), k, len(sides), self.full(sides))
            found.append(total)
        return found

    def input(self, sum_BZhw: Tensor, side: Side) -> Tensor:
        """The sum so far as a transformer reads it before a scale of this side (B,Z,h_k,w_k)."""
        return F.interpolate(sum_BZhw, side, mode=self.input_mode)


class ScaleCodes(ScaleQuantizer):
    """VAR's quantiser: tokens are indices (B,h_k,w_k) of a table of V codes.

    `shared` convolutions of strength `ratio` smooth the enlarged codes: g ↦ (1 - ratio)·g + ratio·conv(g); 0 of them: one for
    each of `scales`. `cosine`: the nearest code by angle.
    """

    def __init__(self, codes: int, latents: int, scales: int, shared: int = 4, ratio: float = 0.5, cosine: bool = False) -> None:
        super().__init__()
        self.ratio, self.cosine, self.per_scale = ratio, cosine, shared == 0
        self.embedding = nn.Embedding(codes, latents)
        convs = [nn.Conv2d(latents, latents, 3, padding=1) for _ in range(shared or scales)] if ratio > 0 else []
        self.smooth = nn.ModuleList(convs)

    def quantise(self, small_BZhw: Tensor) -> Tensor:
        """The index of the nearest code at every position, the first where several are equally near."""
        flat, table = small_BZhw.permute(0, 2, 3, 1).flatten(0, 2), self.embedding.weight.float()
        if self.cosine:
            near = (F.normalize(flat, dim=-1) @ F.normalize(table.T, dim=0)).argmax(dim=1)
        else:
            distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
            near = distance.argmin(dim=1)
        return near.view(len(small_BZhw), *small_BZhw.shape[2:])

    def code(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).permute(0, 3, 1, 2)

    def enlarged(self, code_BZhw: Tensor, k: int, K: int, size: Side) -> Tensor:
        if k < K - 1:
            code_BZhw = F.interpolate(code_BZhw, size, mode="bicubic")
        return self._smoothed(code_BZhw, k, K)

    def growing(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Tokens of every scale → the sum in the size of each scale (B,Z,h_k,w_k), enlarged from scale to scale: small pictures
        for small scales. Neither training nor sampling read it; published as the variant of unequal shapes."""
        found = list[Tensor]()
        for k, one in enumerate(tokens):
            own = self._smoothed(self.code(one), k, len(tokens))
            found.append(own if not found else F.interpolate(found[-1], own.shape[2:], mode="bicubic") + own)
        return found

    def _smoothed(self, code_BZhw: Tensor, k: int, K: int) -> Tensor:
        if not len(self.smooth):
            return code_BZhw
        smooth = self.smooth[k if self.per_scale else shared_index(K, len(self.smooth))[k]]
        return code_BZhw * (1 - self.ratio) + smooth(code_BZhw) * self.ratio

    def forward(self, latents_BZhw: Tensor, sides: Sequence[Side], commitment: float = 0.25) -> tuple[Tensor, QuantizerLosses]:
        """In training: what the decoder reads (straight through), and as the commitment the mean over scales of
        commitment·mse(sum (constant), latents) + mse(sum, latents (constant)), by which the table learns too."""
        latents_BZhw = latents_BZhw.float()
        target = latents_BZhw.detach()
        sums = self.sums(self.encode(target, sides), sides)
        losses = [commitment * F.mse_loss(one.detach(), latents_BZhw) + F.mse_loss(one, target) for one in sums]
        return latents_BZhw + (sums[-1] - latents_BZhw).detach(), QuantizerLosses(None, None, torch.stack(losses).mean())

    @torch.no_grad()
    def lacking(self, latents_BZhw: Tensor, tokens: Sequence[Tensor], sides: Sequence[Side]) -> Tensor:
        """What each token stands for, as the encoder gave it (N,Z), N over all scales, pictures and positions."""
        before = [torch.zeros_like(latents_BZhw), *self.sums(tokens[:-1], sides)]
        small = [self.shrunk(latents_BZhw - one, sides, k) for k, one in enumerate(before)]
        return torch.cat([one.permute(0, 2, 3, 1).flatten(0, 2) for one in small])


class ScaleBits(ScaleQuantizer):
    """Infinity's quantiser: tokens are bits (B,T,h_k,w_k) in {-1,+1}; a code is the signs over √Z.

    With `patchify` a token is 2 × 2 positions of the latents: T = 4·Z, bit 4·c + 2·row + column; sides are then those of
    tokens, half of the latents'.
    """

    input_mode = "bilinear"
    steep = 400.0  # how sharply a bit's probability follows its latent in the entropy terms

    def __init__(self, latents: int, patchify: bool = False) -> None:
        super().__init__()
        self.latents, self.patchify = latents, patchify

    def forward(self, latents_BZhw: Tensor, sides: Sequence[Side]) -> tuple[Tensor, QuantizerLosses]:
        """In training: the sum of all scales, which the decoder reads, and the terms of the loss, means over scales.

        At each scale what is lacking is brought to length 1 over the latents, and its code carries the straight-through gradient.
        """
        rest, total, terms = latents_BZhw.float(), torch.zeros_like(latents_BZhw.float()), []
        for k in range(len(sides)):
            unit = F.normalize(self.shrunk(rest, sides, k), dim=1)
            terms.append(self.terms(unit))
            code = unit + (binarize(unit.detach()) / math.sqrt(self.latents) - unit).detach()
            enlarged = self.enlarged(code, k, len(sides), self.full(sides))
            rest, total = rest - enlarged, total + enlarged
        means = [torch.stack(values).mean() for values in zip(*terms, strict=True)]
        return total, QuantizerLosses(*means)

    def terms(self, unit_BZhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of length 1 → the entropy of a position's bits, that of the mean probabilities, each summed over bits, and the
        mean square distance to the code. Source: public code of the tokenizer's training."""
        up_BZhw = torch.sigmoid(self.steep / math.sqrt(self.latents) * unit_BZhw)
        mean_Z = up_BZhw.mean(dim=(0, 2, 3))
        commitment = (unit_BZhw - binarize(unit_BZhw.detach()) / math.sqrt(self.latents)).square().mean()
        return _entropy(up_BZhw).sum(dim=1).mean(), _entropy(mean_Z).sum(), commitment

    def full(self, sides: Sequence[Side]) -> Side:
        h, w = sides[-1]
        return (2 * h, 2 * w) if self.patchify else (h, w)

    def quantise(self, small_BZhw: Tensor) -> Tensor:
        bits = binarize(small_BZhw)
        return F.pixel_unshuffle(bits, 2) if self.patchify else bits

    def code(self, tokens: Tensor) -> Tensor:
        bits = F.pixel_shuffle(tokens, 2) if self.patchify else tokens
        return bits.float() / math.sqrt(self.latents)

    def enlarged(self, code_BZhw: Tensor, k: int, K: int, size: Side) -> Tensor:
        return F.interpolate(code_BZhw, size, mode="bilinear")

    def input(self, sum_BZhw: Tensor, side: Side) -> Tensor:
        found = super().input(sum_BZhw, self.full([side]))
        return F.pixel_unshuffle(found, 2) if self.patchify else found


def _entropy(p: Tensor) -> Tensor:
    """Of a bit that is up with probability p, in nats."""
    return -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())
