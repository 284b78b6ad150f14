"""Plain attention of the picture networks and the heads, by torch's fused kernels.

B rows, H heads, L queries, S keys, E width of a head.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lfq_tokenizer.entropy import without_autocast

SHORT = 512  # keys up to which float32 is the quicker way back on a processor


def attend(q_BHLE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of all L queries to those of the S keys that the bool mask allows (None: to all) → (B,L,H·E).

    In training on a processor short sequences are in float32 also under autocast: the backward pass of torch's bfloat16 kernel
    takes five times as long there (64 rows of 5 heads and 68 tokens: 55 ms for 11 ms, dev/LOG.md).
    """
    training = torch.is_grad_enabled() and q_BHLE.requires_grad and q_BHLE.dtype != torch.float64
    planned = isinstance(q_BHLE, FakeTensor)  # a plan's tensors stand for those of a GPU
    if training and q_BHLE.device.type == "cpu" and k_BHSE.shape[-2] <= SHORT and not planned:
        with without_autocast(q_BHLE.device):
            return _joined(q_BHLE.float(), k_BHSE.float(), v_BHSE.float(), mask, scale).to(q_BHLE.dtype)
    return _joined(q_BHLE, k_BHSE, v_BHSE, mask, scale)


def _joined(q_BHLE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q_BHLE, k_BHSE, v_BHSE, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)
