"""Hierarchical binary quantisation (HBQ): a latent in (-1, 1) becomes M bits, each of which halves what is left of the range.

    q = 0;  for j = 1 … M:  b_j = sign(f - q),  q = q + b_j·2^-j          so |q - f| ≤ 2^-M

Bits stand round by round: channel (j-1)·C + c is bit j of latent c. With one round the bits are those of lookup-free
quantisation. Source: GRN paper (arXiv 2604.13030), tokenizer section.
"""

import torch
from torch import Tensor, nn

from lfq_tokenizer.binary import binarize
from lfq_tokenizer.quantizer import QuantizerLosses


def hierarchical_bits(z_BChw: Tensor, rounds: int) -> Tensor:
    """Latents (B,C,h,w) → bits (B,rounds·C,h,w) in {-1,+1}. A tie becomes -1. ValueError for NaN."""
    bits = [binarize(z_BChw)]
    value = bits[0] / 2
    for j in range(2, rounds + 1):
        bits.append(binarize(z_BChw - value))
        value = value + bits[-1] * 2.0**-j
    return torch.cat(bits, dim=1)


def hierarchical_values(bits_BChw: Tensor, rounds: int) -> Tensor:
    """Bits (B,rounds·C,h,w) in {-1,+1} → latents (B,C,h,w), odd multiples of 2^-rounds between -1 and 1."""
    parts = bits_BChw.chunk(rounds, dim=1)
    return sum((part * 2.0 ** -(j + 1) for j, part in enumerate(parts[1:], 1)), parts[0] / 2)


class HierarchicalQuantizer(nn.Module):
    """`quantizer(z_BChw) -> (values_BChw, QuantizerLosses)`; no parameters. The latents are tanh(z).

    Values carry the straight-through gradient. There is no entropy term; the commitment, the mean square distance of the
    latents to their values, is there to be watched: published training gives it no weight.
    """

    def __init__(self, dim: int, rounds: int) -> None:
        super().__init__()
        self.dim, self.rounds = dim, rounds

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, QuantizerLosses]:
        if z_BChw.ndim != 4 or z_BChw.shape[1] != self.dim:
            raise ValueError(f"latents have shape {tuple(z_BChw.shape)}; expected (batch, {self.dim}, height, width)")
        latent = z_BChw.tanh()
        target = hierarchical_values(hierarchical_bits(latent.detach(), self.rounds), self.rounds)
        commitment = (latent.float() - target.float()).square().mean()
        return target + (latent - latent.detach()), QuantizerLosses(None, None, commitment)
