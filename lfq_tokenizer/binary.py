"""The only place where a number becomes a bit."""

import torch
from torch import Tensor


def binarize(z: Tensor) -> Tensor:
    """+1 where `z > 0`, else -1; same shape, dtype and device as `z`. Zero and minus zero become -1.

    Source: behaviour of the published tokenizer checkpoints (`where(h > 0, 1, -1)`).
    Raises ValueError when `z` holds a NaN: a NaN never becomes a bit silently.
    """
    bits, lost = binarize_unchecked(z)
    check_lost(lost, z.numel())
    return bits


def binarize_unchecked(z: Tensor) -> tuple[Tensor, Tensor]:
    """`binarize` for a loop that must not wait for its device: the bits, and there the count of NaNs, which the caller
    hands to `check_lost` once the work is done."""
    return torch.where(z > 0, 1.0, -1.0).to(z.dtype), torch.isnan(z).sum()


def check_lost(lost: Tensor, total: int) -> None:
    """ValueError when any of `total` numbers was a NaN."""
    if count := int(lost):
        raise ValueError(
            f"binarize: {count} of {total} values are NaN; only numbers become bits. "
            "Check the input and the weights, or use a dtype with a wider range (bfloat16 or float32)."
        )
