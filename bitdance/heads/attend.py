"""Plain attention of the picture networks and the heads.

B rows, H heads, L queries, S keys, E width of a head.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

SHORT = 512  # keys up to which two products are quicker in training on a processor than torch's fused kernel


def attend(q_BHLE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of all L queries to those of the S keys that the bool mask allows (None: to all) → (B,L,H·E)."""
    if quick_by_hand(q_BHLE, k_BHSE):
        scores_BHLS = (q_BHLE * (q_BHLE.shape[-1] ** -0.5 if scale is None else scale)) @ k_BHSE.transpose(-1, -2)
        if mask is not None:  # a row that may see nothing gets numbers all the same, as padding must
            scores_BHLS = scores_BHLS.masked_fill(~mask, torch.finfo(scores_BHLS.dtype).min)
        out_BHLE = scores_BHLS.softmax(-1) @ v_BHSE
    else:
        out_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHSE, v_BHSE, attn_mask=mask, scale=scale)
    return out_BHLE.transpose(1, 2).flatten(2)


def quick_by_hand(q_BHLE: Tensor, k_BHSE: Tensor) -> bool:
    """Whether two products and a softmax are quicker than torch's fused kernel: in training on a processor, where the kernel's
    way back is slow, most of all in bfloat16 (64 rows of 4 heads and 68 tokens: 50 ms for 9 ms, dev/LOG.md)."""
    planned = isinstance(q_BHLE, FakeTensor)  # a plan's tensors stand for those of a GPU
    training = torch.is_grad_enabled() and q_BHLE.requires_grad
    return training and q_BHLE.device.type == "cpu" and k_BHSE.shape[-2] <= SHORT and not planned
