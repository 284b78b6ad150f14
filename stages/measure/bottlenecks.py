"""What can stand between one encoder and one decoder: lookup-free bits of this project, and what a user would pick instead.

The alternatives are those of the package vector-quantize-pytorch, at its defaults except where noted. Every bottleneck maps
latents (B,C,h,w) of its own width C to what the decoder reads, of the same shape, and adds its own loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lfq_tokenizer import HierarchicalQuantizer, LookupFreeQuantizer
from lfq_tokenizer.scales import ScaleBits, squares
from stages.config import TokenizerTraining

ROUNDS = 4  # of hierarchical binary quantisation
BITS_PER_CODEBOOK = 8  # of residual VQ and of the groups of lookup-free bits
CODE_WIDTH = 8  # channels of a code vector of VQ; residual VQ sums vectors of four times that
LARGEST_CODEBOOK = 16  # bits; a table of 2^16 vectors is about the largest that people train


@dataclass(frozen=True)
class Bottleneck:
    """`channels` between encoder and decoder; `quantize(z_BChw) -> (codes_BChw, loss)`; `bits` per token (log2 of the codes)."""

    channels: int
    quantize: nn.Module
    bits: float


class _Lookup(nn.Module):
    """LFQ with groups, with the weights of the losses as in the training recipe."""

    def __init__(self, bits: int, weights: TokenizerTraining) -> None:
        super().__init__()
        self.quantizer = LookupFreeQuantizer(bits, max(1, bits // BITS_PER_CODEBOOK), weights.temperature)
        self.weights = weights

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor]:
        bits_BChw, losses = self.quantizer(z_BChw)
        return bits_BChw, self.weights.entropy_weight * losses.entropy + self.weights.commitment_weight * losses.commitment


class _Hierarchical(nn.Module):
    """HBQ, which has no loss of its own."""

    def __init__(self, channels: int, rounds: int) -> None:
        super().__init__()
        self.quantizer = HierarchicalQuantizer(channels, rounds)

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantizer(z_BChw)[0], z_BChw.new_zeros(())


class _MultiScale(nn.Module):
    """Bits at 1×1, 2×2, 4×4, … tokens, with the weights of published training and no dropout of scales."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.quantizer = ScaleBits(channels)

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor]:
        side = z_BChw.shape[2]
        if z_BChw.shape[3] != side or side & (side - 1):
            raise ValueError(f"latents of {side}×{z_BChw.shape[3]}; this compares squares of 2, 4, 8, … tokens")
        sum_BChw, losses = self.quantizer(z_BChw, squares([2**k for k in range(side.bit_length())]))
        return sum_BChw, 0.004 * losses.entropy + losses.commitment


class _Package(nn.Module):
    """A quantiser of the package: returns (codes, indices, loss) or (codes, indices)."""

    def __init__(self, inner: nn.Module, images: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.images, self.scale = inner, images, scale

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor]:
        B, C, h, w = z_BChw.shape
        codes, _, *loss = self.inner(z_BChw if self.images else z_BChw.flatten(2).transpose(1, 2))
        if not self.images:
            codes = codes.transpose(1, 2).reshape(B, C, h, w)
        return codes * self.scale, loss[0].sum() if loss else z_BChw.new_zeros(())


class _Continuous(nn.Module):
    """No quantisation but the rounding to bfloat16, so that a channel holds 16 bits."""

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor]:
        rounded = z_BChw.bfloat16().to(z_BChw.dtype)
        return z_BChw + (rounded - z_BChw).detach(), z_BChw.new_zeros(())


def _lfq(bits: int, weights: TokenizerTraining) -> Bottleneck:
    return Bottleneck(bits, _Lookup(bits, weights), bits)


def _hbq(bits: int, weights: TokenizerTraining) -> Bottleneck:
    """Four bits per latent, as the published tokenizers."""
    return Bottleneck(bits // ROUNDS, _Hierarchical(bits // ROUNDS, ROUNDS), bits)


def _multi_scale(bits: int, weights: TokenizerTraining) -> Bottleneck:
    """As many bits of a picture as the others have, or fewer: 1 + 4 + … + n² tokens are less than 4/3 of n²."""
    channels = 3 * bits // 4
    return Bottleneck(channels, _MultiScale(channels), bits)


def _bsq(bits: int, weights: TokenizerTraining) -> Bottleneck:
    from vector_quantize_pytorch import LFQ

    width = min(bits, BITS_PER_CODEBOOK)
    quantizer = LFQ(dim=bits, codebook_size=2**width, num_codebooks=bits // width, spherical=True)
    return Bottleneck(bits, _Package(quantizer, scale=math.sqrt(width)), bits)  # codes ±1 as the decoder of LFQ reads them


def _fsq(bits: int, weights: TokenizerTraining) -> Bottleneck:
    """16 bits are the levels 8,8,8,8,4,4 (six channels), and so on."""
    from vector_quantize_pytorch import FSQ

    if bits % 16 and bits != 8:
        raise ValueError(f"FSQ at {bits} bits: the table of levels knows 8 and multiples of 16")
    levels = [8, 8, 4] if bits == 8 else [8, 8, 8, 8, 4, 4] * (bits // 16)
    quantizer = FSQ(levels, return_indices=bits <= LARGEST_CODEBOOK)  # beyond 2^31 codes a token has no integer index
    return Bottleneck(len(levels), _Package(quantizer), math.log2(math.prod(levels)))


def _vq(bits: int, weights: TokenizerTraining) -> Bottleneck:
    """One codebook up to 16 bits; beyond, heads with a codebook of 16 bits each (product VQ)."""
    from vector_quantize_pytorch import VectorQuantize

    heads = max(1, bits // LARGEST_CODEBOOK)
    quantizer = VectorQuantize(
        dim=CODE_WIDTH * heads,
        codebook_size=2 ** (bits // heads),
        codebook_dim=CODE_WIDTH,
        heads=heads,
        separate_codebook_per_head=heads > 1,
        use_cosine_sim=True,  # the package's own advice against codes that are never used
        threshold_ema_dead_code=2,  # likewise
        accept_image_fmap=True,
    )
    return Bottleneck(CODE_WIDTH * heads, _Package(quantizer), bits)


def _rvq(bits: int, weights: TokenizerTraining) -> Bottleneck:
    from vector_quantize_pytorch import ResidualVQ

    quantizer = ResidualVQ(
        dim=4 * CODE_WIDTH,
        num_quantizers=bits // BITS_PER_CODEBOOK,
        codebook_size=2**BITS_PER_CODEBOOK,
        kmeans_init=True,  # the package's own advice
        threshold_ema_dead_code=2,
    )
    return Bottleneck(4 * CODE_WIDTH, _Package(quantizer, images=False), bits)


def _continuous(bits: int, weights: TokenizerTraining) -> Bottleneck:
    """bits / 16 channels of 16 bits each."""
    return Bottleneck(max(1, bits // 16), _Continuous(), 16 * max(1, bits // 16))


def _continuous_width(bits: int, weights: TokenizerTraining) -> Bottleneck:
    """As many channels as LFQ has bits, hence 16 times its bits: a ceiling, not a rival."""
    return Bottleneck(bits, _Continuous(), 16 * bits)


BOTTLENECKS: dict[str, Callable[[int, TokenizerTraining], Bottleneck]] = {
    "lfq": _lfq,
    "hbq": _hbq,
    "multi_scale": _multi_scale,
    "bsq": _bsq,
    "fsq": _fsq,
    "vq": _vq,
    "rvq": _rvq,
    "continuous": _continuous,
    "continuous-width": _continuous_width,
}


def build_bottleneck(name: str, bits: int, weights: TokenizerTraining, seed: int = 0) -> Bottleneck:
    """A fresh bottleneck of `bits` per token; its own weights and codebooks are drawn from `seed`."""
    if name not in BOTTLENECKS:
        raise ValueError(f"bottleneck {name!r}; known are {', '.join(BOTTLENECKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BOTTLENECKS[name](bits, weights)
