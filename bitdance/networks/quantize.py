"""Weights in 8 or 4 bits: the large matrices of the LLM and of the head's blocks. Activations stay as they are.

    int8   LLM or head, one scale per output channel           torchao
    fp8    head, e4m3 with one scale per output channel        torchao
    int4   LLM, NF4 in groups of 64, scales in 8 bits          bitsandbytes (QLoRA, arXiv 2305.14314)

A matrix is brought to its device and quantised there before the next one comes, so neither the device nor, when the file's dtype
is kept till then, main memory ever holds the whole model at full precision. Embedding, norms, projector, the head's embeddings
and modulations, and the decoder stay: they are few bytes, or right before the sign.
"""

import copy
import ctypes
import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitdance.networks.kernels import multiplied, use_onednn
from bitdance.networks.precision import DTYPES

if TYPE_CHECKING:
    from bitdance.model import BitDanceModel

BACKBONE_SCHEMES = ("int8", "int4")
HEAD_SCHEMES = ("int8", "fp8")
_WIDTH, _TOKENS = 5120, 64  # of the layer that is measured: the published 14B's, and a block of its tokens
_LIBRARY = {"int8": "torchao", "fp8": "torchao", "int4": "bitsandbytes"}
_NF4_GROUP, _NF4_SCALES = 64, 256  # weights that share a scale, scales that share a scale
_NF4_TABLES = 4 * (16 + 256 + 1)  # bytes per matrix: the codes of weights and scales, and the mean scale


def check_quantization(quantize: str | None, quantize_head: str | None, device: torch.device | str) -> None:
    """ValueError for a kind that there is not, whose library is not installed, or that `device` cannot compute with."""
    for option, kind, allowed in (("quantize", quantize, BACKBONE_SCHEMES), ("quantize_head", quantize_head, HEAD_SCHEMES)):
        if kind is None:
            continue
        if kind not in allowed:
            raise ValueError(f"{option} = {kind!r}; allowed are {', '.join(allowed)}")
        if importlib.util.find_spec(_LIBRARY[kind]) is None:
            raise ValueError(f'{option} = {kind!r} needs {_LIBRARY[kind]}: pip install "bitdance[quantize]"')
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(f"{option} = {kind!r} has no kernel on {device}; use cpu or cuda, or leave it out")


def quantize_model(
    model: "BitDanceModel", backbone: str | None, head: str | None, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Quantise in place, matrix by matrix, on `device`; `dtype` is that of the activations. The rest of the model is not moved.

    `model.quantized` then says what was done. ValueError as in `check_quantization`.
    """
    check_quantization(backbone, head, device)
    for part, kind in (("backbone", backbone), ("head", head)):
        if kind is None:
            continue
        for parent, name, linear in large_linears(getattr(model, part)):
            linear.to(device=device, dtype=dtype).requires_grad_(False).eval()
            setattr(parent, name, _QUANTIZERS[kind](linear))
        _detach_from_file(getattr(model, part), device, dtype)
    _give_back()
    model.quantized = {part: kind for part, kind in (("backbone", backbone), ("head", head)) if kind is not None}


def _detach_from_file(part: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """A file stays mapped, with all its bytes, as long as one tensor is a view of it: copy what is not quantised."""
    copies: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if type(weight) is nn.Parameter and type(weight.data) is Tensor:
                if weight not in copies:
                    copies[weight] = nn.Parameter(weight.detach().to(device=device, dtype=dtype, copy=True), requires_grad=False)
                setattr(module, name, copies[weight])


def _give_back() -> None:
    """Return to the system what was freed on the way; glibc's heap keeps by chance some or a lot of it (measured: up to a
    fifth of a small model's peak). Nothing happens with another C library."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def large_linears(part: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, matrix) of every linear layer in the layers of a backbone or the blocks of a head, in order. Matrices may be
    replaced on the way."""
    layers = part.lm.base_model.layers if hasattr(part, "lm") else part.net.res_blocks
    for parent in [module for module in layers.modules() if not isinstance(module, nn.Linear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                yield parent, name, child


def quantized_bytes(rows: int, columns: int, kind: str) -> int:
    """Bytes of a matrix (rows, columns) once quantised, without its bias."""
    count = rows * columns
    if kind == "int4":
        groups = -(-count // _NF4_GROUP)
        return -(-count // 2) + groups + 4 * -(-groups // _NF4_SCALES) + _NF4_TABLES
    return count + rows * (5 if kind == "int8" else 4)  # a float32 scale, and torchao's zero point for int8


def held_bytes(linear: nn.Linear) -> int:
    """Bytes that the weight of a linear layer really takes, quantised or not."""
    state = getattr(linear.weight, "quant_state", None)  # of bitsandbytes, beside the weight
    tensors = [*_plain(linear.weight), *([] if state is None else _tensors(state))]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _plain(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that a tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [inner for name in tensor.__tensor_flatten__()[0] for inner in _plain(getattr(tensor, name))]


def _tensors(state: object) -> list[Tensor]:
    """Scales and tables; scales may have scales."""
    values = vars(state).values()
    return [v for v in values if isinstance(v, Tensor)] + [t for v in values if hasattr(v, "absmax") for t in _tensors(v)]


class Int8Linear(nn.Linear):
    """torchao's layer with int8 weights, which on a CPU turns them into numbers of the input's dtype strip by strip.

    torchao turns all of a matrix at once, and the system clears the memory for it page by page, which takes several times as long
    as the product. A strip stays in the cache. The numbers are the same, up to rounding in float32.
    """

    STRIP = 256  # rows

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight  # torchao's, with its names
        known = all(isinstance(getattr(weight, name, None), Tensor) for name in ("qdata", "scale"))
        by_row = known and weight.scale.numel() == len(weight.qdata)
        if by_row and input.device.type == "cpu" and not torch.is_grad_enabled():
            return self._in_strips(input, weight.qdata, weight.scale.flatten())
        return super().forward(input)

    def _in_strips(self, input: Tensor, integers_OI: Tensor, scale_O: Tensor) -> Tensor:
        out = input.new_empty(*input.shape[:-1], len(integers_OI))
        strip_SI = input.new_empty(self.STRIP, self.in_features)
        for start in range(0, len(integers_OI), self.STRIP):
            part_SI = integers_OI[start : start + self.STRIP]
            out[..., start : start + len(part_SI)] = multiplied(input, strip_SI[: len(part_SI)].copy_(part_SI))
        out *= scale_O.to(out.dtype)
        return out if self.bias is None else out + self.bias


def _by_torchao(kind: str, linear: nn.Linear) -> nn.Linear:
    with quietly():
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_

        config = (
            Int8WeightOnlyConfig(set_inductor_config=False)
            if kind == "int8"
            else Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
        )
        quantize_(linear, config, filter_fn=lambda *_: True)
    if kind == "int8":
        linear.__class__ = Int8Linear
    return linear


def _int4(linear: nn.Linear) -> nn.Linear:
    with quietly():
        from bitsandbytes.nn import Linear4bit, Params4bit
    weight = linear.weight
    with torch.device("meta"):
        new = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    new.weight = Params4bit(
        weight.data, requires_grad=False, quant_type="nf4", blocksize=_NF4_GROUP, compress_statistics=True, module=new
    ).to(weight.device)
    new.bias = linear.bias
    return new.eval()


_QUANTIZERS = {"int8": lambda x: _by_torchao("int8", x), "fp8": lambda x: _by_torchao("fp8", x), "int4": _int4}


@cache
def times_as_long(kind: str, dtype: torch.dtype) -> float:
    """How many times as long as with plain weights of this dtype a linear layer of the 14B's width takes with weights of this
    kind on this CPU: measured, in one thread and a few seconds, as the quickest of several products each. ValueError where
    the library is missing."""
    part = "quantize" if kind in BACKBONE_SCHEMES else "quantize_head"
    check_quantization(**{"quantize": None, "quantize_head": None, part: kind}, device="cpu")
    threads, seconds = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            plain = nn.Linear(_WIDTH, _WIDTH, bias=False, dtype=dtype).requires_grad_(False)
        quantised = _QUANTIZERS[kind](copy.deepcopy(plain))
        use_onednn(plain)
        x_RI = torch.ones(_TOKENS, _WIDTH, dtype=dtype)
        with torch.inference_mode():
            for layer in (plain, quantised):
                layer(x_RI)  # makes what it keeps
                seconds[layer] = min(_seconds(layer, x_RI) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    return seconds[quantised] / seconds[plain]


def _seconds(layer: nn.Module, x_RI: Tensor) -> float:
    start = time.process_time()
    layer(x_RI)
    return time.process_time() - start


def speed_of(kind: str, dtype: str) -> str:
    """What weights of this kind cost in time on this CPU, in a sentence."""
    factor = times_as_long(kind, DTYPES[dtype])
    said = f"{kind} weights make a linear layer take {factor:.1f} times as long as {dtype} ones on this CPU"
    advice = "; they save memory here, not time" if factor > 1.05 else ""
    return f"{said} ({_WIDTH}×{_WIDTH}, {_TOKENS} tokens, one thread, measured just now){advice}"


@contextmanager
def quietly() -> Iterator[None]:
    """Both libraries report kernels that they do not find; and bitsandbytes must not fetch one (through `kernels`)."""
    level, kernels = logging.root.manager.disable, sys.modules.get("kernels")
    logging.disable(logging.WARNING)
    if kernels is None and "bitsandbytes" not in sys.modules:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logging.disable(level)
        if kernels is None:
            sys.modules.pop("kernels", None)


__all__ = [
    "BACKBONE_SCHEMES",
    "HEAD_SCHEMES",
    "check_quantization",
    "held_bytes",
    "large_linears",
    "quantize_model",
    "quantized_bytes",
    "quietly",
    "speed_of",
    "times_as_long",
]
