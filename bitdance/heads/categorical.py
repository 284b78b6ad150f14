"""Values from logits: temperature aside, the k likeliest, the likeliest share p, and a draw. A bit is a value of two.

V values in the last dimension. Sources: public codes of VAR, Infinity and GRN for the order of operations.
"""

import torch
from torch import Tensor


def filtered(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """The logits with -inf in place of values that are not drawn. First all below the `top_k`-th largest go (equal ones stay),
    then, of what is left, the least likely values whose probabilities together are at most 1 - `top_p`; the likeliest always
    stays. 0 switches either off."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p > 0:
        ordered, place = logits.sort(dim=-1)
        out = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        out[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, place, out), -torch.inf)
    return logits


def draw(logits: Tensor, exponential: Tensor) -> Tensor:
    """A value with the probabilities of the logits: the one whose p / q is largest, q standard exponential numbers of their
    shape."""
    return (logits - exponential.log()).argmax(dim=-1)


def softened(logits: Tensor, exponential: Tensor, heat: float) -> Tensor:
    """Shares of the values instead of a draw (the Gumbel softmax); the smaller `heat`, the nearer to one value alone."""
    return ((logits - exponential.log()) / heat).softmax(dim=-1)
