"""Latents → bits, with the losses that keep every bit in use."""

from dataclasses import dataclass

from torch import Tensor, nn

from lfq_tokenizer.binary import binarize
from lfq_tokenizer.entropy import check_groups, group_entropy


@dataclass(frozen=True)
class QuantizerLosses:
    """Scalars; None: the quantiser has no such term. `entropy` is what training minimises: per sample (be sure of each bit) minus
    of the mean (use every code)."""

    entropy_per_sample: Tensor | None
    entropy_of_mean: Tensor | None
    commitment: Tensor

    @property
    def entropy(self) -> Tensor | float:
        if self.entropy_per_sample is None or self.entropy_of_mean is None:
            return 0.0
        return self.entropy_per_sample - self.entropy_of_mean

    @property
    def terms(self) -> dict[str, Tensor]:
        """The terms that there are, by name."""
        return {name: term for name, term in vars(self).items() if term is not None}


class NoQuantizer(nn.Module):
    """`quantizer(z_BChw) -> (numbers_BChw, QuantizerLosses)`: tanh(z) and no terms; what bits are compared with."""

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, QuantizerLosses]:
        return z_BChw.tanh(), QuantizerLosses(None, None, z_BChw.new_zeros(()))


class LookupFreeQuantizer(nn.Module):
    """`quantizer(z_BChw) -> (bits_BChw, QuantizerLosses)`; no parameters.

    dim          bits per token C
    groups       number of groups of the entropy loss; any divisor of `dim` with at most 18 bits per group
    temperature  of the softmax over codes
    pool_groups  pool the groups in the mean probability, as the published tokenizers do

    The bits carry the straight-through gradient: d bits / d z is the identity. The commitment is the mean square distance of z to
    its own (constant) bits.
    # OFFICIAL: the public code averages the commitment over batch rows 1, 2, 4, … only; here it is the plain mean.
    Source: BitDance paper (arXiv 2602.14041), tokenizer section.
    """

    def __init__(self, dim: int, groups: int = 1, temperature: float = 0.01, pool_groups: bool = True) -> None:
        super().__init__()
        check_groups(dim, groups)
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature}; it must be positive (published: 0.01)")
        self.dim, self.groups, self.temperature, self.pool_groups = dim, groups, temperature, pool_groups

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, QuantizerLosses]:
        if z_BChw.ndim != 4 or z_BChw.shape[1] != self.dim:
            raise ValueError(f"latents have shape {tuple(z_BChw.shape)}; expected (batch, {self.dim}, height, width)")
        target = binarize(z_BChw.detach())
        bits = target + (z_BChw - z_BChw.detach())  # in this order exactly ±1, in half precision too
        per_sample, of_mean = group_entropy(z_BChw, self.groups, self.temperature, self.pool_groups)
        commitment = (z_BChw.float() - target.float()).square().mean()
        return bits, QuantizerLosses(per_sample, of_mean, commitment)
