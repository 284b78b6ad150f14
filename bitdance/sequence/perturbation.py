"""Random bit flips on the model's own input, so that training meets the mistakes that sampling makes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_perturbation(
    shape: Sequence[int],
    p_max: float,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which bits to flip, bool of `shape`: where `r1 < p_max·r2`, both uniform per bit, `p_max/2` of them on average.

    Draws r1 then r2, on the device of `generator`, at every p_max, 0 included, so that a change of p_max does not shift
    the draws that follow. Raises ValueError unless 0 ≤ p_max ≤ 1.
    Source: BitDance paper, arXiv 2602.14041; draw order as in the published training code's recorded numbers.
    """
    if not 0.0 <= p_max <= 1.0:
        raise ValueError(f"the largest flip probability must lie in [0, 1], got {p_max}")
    device = device if generator is None else generator.device
    r1 = torch.rand(*shape, generator=generator, dtype=dtype, device=device)
    r2 = torch.rand(*shape, generator=generator, dtype=dtype, device=device)
    return r1 < p_max * r2


def perturb_bits(bits: Tensor, p_max: float, generator: torch.Generator | None = None) -> Tensor:
    """±1 `bits` (any shape, floating point) with the signs of `draw_perturbation` turned."""
    if not bits.dtype.is_floating_point:
        raise ValueError(f"bits must be floating point ±1, got {bits.dtype}; convert with .float()")
    flipped = draw_perturbation(bits.shape, p_max, generator, bits.dtype, bits.device)
    return torch.where(flipped.to(bits.device), -bits, bits)
