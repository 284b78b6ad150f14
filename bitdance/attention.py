"""The one attention dispatch of the backbone: which kernel serves which mask.

R rows, H query heads, G of them to a key head, L new positions, S keys, E width of a head.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "bitdance"
Runs = list[tuple[int, int, int]]


def padding_runs(padding: Sequence[int]) -> Runs:
    """Neighbouring rows with the same count of padding → (first row, end, padding)."""
    runs, first = [], 0
    for count, rows in groupby(padding):
        end = first + len(list(rows))
        runs.append((first, end, count))
        first = end
    return runs


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    runs: Runs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Rows with padding at their left go to `_open`, a BlockMask to flex_attention, a bool mask or none to SDPA.

    Registered without a mask function, so transformers builds no mask of its own and hands ours through. Without a
    mask `is_causal`, given per call, says whether the new positions are causal. ValueError where the layers on the way
    have lost `is_causal` or turned the mask into another.
    """
    if "is_causal" not in kwargs or (isinstance(attention_mask, Tensor) and attention_mask.dtype != torch.bool):
        raise ValueError(
            f"{type(module).__name__} did not get the mask as Backbone gives it: this family rewrites masks, or the language "
            'model was called by itself, which needs lm.set_attn_implementation("sdpa") first'
        )
    if runs is not None:
        return _open(query, key, value, runs, kwargs.get("scaling")), None
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    flex = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    out_RHLE = flex(query, key, value, block_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True)
    return out_RHLE.transpose(1, 2).contiguous(), None


def _open(query_RHLE: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """Every new position sees all keys of its row but the padding → (R,L,H,E); no mask, no repeated keys.

    Without a mask the order of queries does not matter, so the G·L queries that share a key head stand in one row, and
    every kernel of SDPA, flash included, serves grouped queries. Rows of equal padding are one call.
    """
    R, H, L, E = query_RHLE.shape
    folded = query_RHLE.reshape(R, key.shape[1], -1, E)
    parts = [
        scaled_dot_product_attention(folded[a:b], key[a:b, :, hidden:], value[a:b, :, hidden:], scale=scale)
        for a, b, hidden in runs
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(R, H, L, -1).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, _attention)
_flex: Any = None


def _compiled_flex() -> Any:
    global _flex
    if _flex is None:
        _flex = torch.compile(flex_attention)
    return _flex
