"""The only place where a number becomes a bit."""

import torch
from torch import Tensor


def binarize(z: Tensor) -> Tensor:
    """+1 where `z > 0`, else -1; same shape, dtype and device as `z`. Zero and minus zero become -1.

    Source: behaviour of the published tokenizer checkpoints (`where(h > 0, 1, -1)`).
    Raises ValueError when `z` holds a NaN: a NaN never becomes a bit silently.
    """
    if torch.isnan(z).any():
        count = int(torch.isnan(z).sum())
        raise ValueError(
            f"binarize: {count} of {z.numel()} values are NaN; only numbers become bits. "
            "Check the input and the weights, or use a dtype with a wider range (bfloat16 or float32)."
        )
    return torch.where(z > 0, 1.0, -1.0).to(z.dtype)
