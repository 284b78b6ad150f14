"""The one attention dispatch of the backbone: which kernel serves which mask.

A BlockMask, which training on GPUs uses, goes to flex_attention. torch has two kernels for it: its own in Triton, and FLASH,
which calls the package flash-attn-4 on GPUs of compute capability 9 and 10 (`_Flex`). Without a mask SDPA serves, also while
decoding.

R rows, H query heads, G of them to a key head, L new positions, S keys, E width of a head.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bitdance.heads.attend import attend, quick_by_hand
from bitdance.sequence.mask import flex_mask_mod
from lfq_tokenizer.entropy import without_autocast

ATTENTION = "bitdance"
FLASH_TOLERANCE = 0.02  # relative, of outputs and gradients in 16 bits
# What compiler, templates and package raise. Not all exceptions: those of checkpointed layers pass through here on their way.
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError)
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
    """Rows with padding at their left go to `_open`, a BlockMask to flex_attention, a bool mask or none to SDPA, and a mask in
    training on a processor to `attend`.

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
    if isinstance(attention_mask, Tensor) and quick_by_hand(query, key):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        out_RLD = attend(query, key, value, attention_mask, kwargs.get("scaling"))
        return out_RLD.unflatten(2, (query.shape[1], -1)), None
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


def without_flash(device: torch.device, dtype: torch.dtype) -> str:
    """Why the FLASH kernel of flex_attention cannot serve there; "" where it can."""
    try:
        installed = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # not even a package of that name
        installed = False
    if not installed:
        return "flash-attn-4 is not installed"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return f"{device} is no GPU of compute capability 9 or 10"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} has more than 16 bits"
    return ""


class _Flex:
    """flex_attention compiled: FLASH where it can serve and was found right, else torch's own kernel.

    FLASH is young, and has had gradients that were wrong in silence (flash-attention's issue 2623). So the first call of every
    kind (device, dtype, heads, width) compares outputs and gradients of both kernels on a small packed row. Where they differ,
    or FLASH cannot be compiled, also later for another length, a warning says so and torch's own kernel serves from then on.
    """

    def __init__(self) -> None:
        self.plain: Callable[..., Tensor] = torch.compile(flex_attention)
        self.flash: Callable[..., Tensor] = torch.compile(partial(flex_attention, kernel_options={"BACKEND": "FLASH"}))
        self._right: dict[tuple[Any, ...], bool] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        kind = (query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1])
        if kind not in self._right:
            self._right[kind] = not without_flash(query.device, query.dtype) and self._compare(*kind)
        if self._right[kind]:
            try:
                return self.flash(query, key, value, **options)
            except REFUSALS as error:
                self._right[kind] = _refuse(error)
        return self.plain(query, key, value, **options)

    def _compare(self, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
        # whoever computes activations again must not count these tensors among theirs
        apart = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
        try:
            with torch.inference_mode(False), torch.enable_grad(), without_autocast(device), apart:
                found = [_outputs(run, device, dtype, heads, key_heads, width) for run in (self.plain, self.flash)]
        except REFUSALS as error:
            return _refuse(error)
        apart_by = max(float((a - b).norm() / a.norm().clamp(min=1e-9)) for a, b in zip(*found, strict=True))
        return apart_by <= FLASH_TOLERANCE or _refuse(f"outputs or gradients are off by {apart_by:.3g} of their size")


def _outputs(
    run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int
) -> list[Tensor]:
    """Output and gradients on a row of 512 positions: two documents of text and picture blocks of 64, one causal, and padding."""
    place_1L = torch.arange(512, device=device)[None]
    doc_1L = torch.where(place_1L < 480, place_1L // 160, -1)
    block_1L = torch.where((place_1L < 320) & (place_1L % 160 >= 32), place_1L // 160 * 2 + (place_1L % 160 - 32) // 64, -1)
    mask = create_block_mask(flex_mask_mod(doc_1L, block_1L), 1, None, 512, 512, device=device)
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(1, h, 512, width, generator=generator, device=device) for h in (heads, key_heads, key_heads, heads)]
    query, key, value, grad = (part.to(dtype) for part in drawn)
    inputs = [part.requires_grad_() for part in (query, key, value)]
    out = run(*inputs, block_mask=mask, enable_gqa=True)
    return [part.float() for part in (out.detach(), *torch.autograd.grad(out, inputs, grad))]


def _refuse(reason: object) -> bool:
    said = " ".join(str(reason).split("\n\n")[0].split()) or repr(reason)
    warnings.warn(f"flash-attn-4 is installed and not used, torch's own kernel serves instead: {said}", stacklevel=3)
    return False


@cache
def _compiled_flex() -> _Flex:
    return _Flex()
