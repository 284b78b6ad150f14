"""The block-causal mask, from a document number and a block number per position.

The sentence that defines it: a position sees the positions of its own document that are not after it or that lie in
its own block; padding sees only itself. (BitDance paper, arXiv 2602.14041, block-causal mask; packed documents do not
see each other.)

B batch, L sequence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def dense_mask(doc_BL: Tensor, block_BL: Tensor) -> Tensor:
    """Bool (B,1,L,L), True where the query (second last axis) may see the key (last axis). For SDPA.

    `doc_BL`: document of each position, -1 for padding. `block_BL`: block of each position, -1 for causal positions,
    unique per image block within a row.
    """
    L = doc_BL.shape[1]
    place_L = torch.arange(L, device=doc_BL.device)
    causal_LL = place_L[:, None] >= place_L[None, :]
    itself_LL = place_L[:, None] == place_L[None, :]
    same_document_BLL = (doc_BL[:, :, None] == doc_BL[:, None, :]) & (doc_BL >= 0)[:, :, None]
    same_block_BLL = (block_BL[:, :, None] == block_BL[:, None, :]) & (block_BL >= 0)[:, :, None]
    return ((same_document_BLL & (causal_LL | same_block_BLL)) | itself_LL)[:, None]


def flex_mask_mod(doc_BL: Tensor, block_BL: Tensor) -> MaskMod:
    """The same mask as a `mask_mod(batch, head, query, key)` for torch's flex_attention."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        document = doc_BL[batch, query]
        block = block_BL[batch, query]
        same_document = (document == doc_BL[batch, key]) & (document >= 0)
        same_block = (block == block_BL[batch, key]) & (block >= 0)
        return (same_document & ((query >= key) | same_block)) | (query == key)

    return mask_mod
