"""Faster kernels with the numbers of the plain ones up to rounding: used where they can run, never required.

On a CPU torch multiplies float32 matrices with MKL, which on processors of other makers leaves half of their speed unused;
oneDNN, which torch has on board for other dtypes, does not. `use_onednn` sends inference through it, with weights in the order
that it reads best.

Liger (package `liger-kernel`, written for 0.8) computes an RMSNorm, and the product inside a SwiGLU, in one Triton kernel each,
with the numbers of transformers' modules up to rounding. Its rotary kernel is left out: transformers calls rotation through a
global function of the family's file, so taking it would change every other model of the process, also one on the CPU.

Kernels of attention are chosen in `attention.py`. The package flash-attn-4 serves training there, through flex_attention. What is
without a mask, decoding and the head's attention over the P tokens of a block, runs on SDPA, whose flash backend is the same
algorithm.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # their norms and SwiGLU are one code in transformers


PACK_LIMIT = 1 << 30  # bytes of weights up to which a second, packed copy is kept


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` whose forward pass without gradients runs in oneDNN. Parameters and their names are as before."""

    packing = False
    _packed: tuple[Tensor, tuple[int, int], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        return self.biased(input, self.bias)

    def biased(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """With this bias."""
        weight = self.weight
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()  # the compiler chooses for itself
            or input.device.type != "cpu"
            or input.dtype != weight.dtype
            or not served_by_onednn(input.dtype)
        ):
            return nn.functional.linear(input, weight, bias)
        if self.packing:
            packed, state = self._packed, (weight._version, weight.data_ptr())  # which loading and training change
            if packed is None or packed[0] is not weight or packed[1] != state:
                packed = self._packed = weight, state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            weight = packed[2]
        result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OneDnnLinear":  # `.to` passes here
        self._packed = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles pack anew
        return {**self.__dict__, "_packed": None}


def multiplied(input: Tensor, weight: Tensor) -> Tensor:
    """input · weightᵀ without gradients on a CPU, in oneDNN where it serves the dtype."""
    if not (torch.backends.mkldnn.is_available() and served_by_onednn(input.dtype)):
        return nn.functional.linear(input, weight)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, None, "none", [], "")
    return result


def linear(layer: nn.Linear, input: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with a bias that is put together from several parameters."""
    return layer.biased(input, bias) if isinstance(layer, OneDnnLinear) else nn.functional.linear(input, layer.weight, bias)


def use_onednn(*modules: nn.Module) -> int:
    """Let the linear layers of these modules run in oneDNN when they infer on a CPU, and return how many do.

    Up to `PACK_LIMIT` bytes of weights each keeps a packed copy beside its weight; above, weights are read as they are. Layers
    of other kinds, quantised ones among them, stay as they are. Nothing happens where torch was built without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    layers = [layer for module in modules for layer in module.modules() if _plain_linear(layer)]
    packing = sum(layer.weight.nbytes for layer in layers) <= PACK_LIMIT
    for layer in layers:
        layer.__class__ = OneDnnLinear
        layer.packing = packing
    return len(layers)


@contextmanager
def without_onednn(module: nn.Module) -> Iterator[None]:
    """Its linear layers compute in plain torch for a while, which counts their operations."""
    layers = [layer for layer in module.modules() if type(layer) is OneDnnLinear]
    for layer in layers:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = OneDnnLinear


@cache
def served_by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype here: float32 always, bfloat16 where the processor has it."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _plain_linear(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, OneDnnLinear) and type(layer.weight.data) is Tensor


def use_fused_kernels(lm: nn.Module, device: torch.device | str | None = None) -> list[str]:
    """Replace modules of this instance by Liger's, and return the kernels now in use: "RMSNorm", "SwiGLU", or none.

    Nothing happens without Liger, off CUDA, or for a family whose modules differ. `device` is where `lm` will run, by default
    where its weights are; afterwards it runs there only. Weights, their names and files stay as they are.
    """
    target = next(lm.parameters()).device if device is None else torch.device(device)
    if target.type != "cuda" or not torch.cuda.is_available() or lm.config.model_type not in FAMILIES:
        return []
    try:
        from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    except ImportError:
        return []
    return _replace(lm, LigerRMSNorm, LigerSwiGLUMLP)


def _replace(lm: nn.Module, rms_norm: Any, swiglu: Any) -> list[str]:
    used = set()
    for parent in list(lm.modules()):
        for name, old in parent.named_children():
            kind = type(old).__name__
            with torch.device("meta"):  # the weights are the old module's
                if kind.endswith("RMSNorm"):
                    # in_place would write over a gradient that the residual still needs
                    new = rms_norm(old.weight.shape[0], eps=old.variance_epsilon, in_place=False)
                    new.weight = old.weight
                    used.add("RMSNorm")
                elif kind.endswith("MLP") and _plain_swiglu(old):
                    new = swiglu(old.config)
                    for linear in ("gate_proj", "up_proj", "down_proj"):
                        setattr(new, linear, getattr(old, linear))
                    used.add("SwiGLU")
                else:
                    continue
            setattr(parent, name, new.train(old.training))
    return sorted(used)


def _plain_swiglu(mlp: nn.Module) -> bool:
    return hasattr(mlp, "gate_proj") and mlp.config.hidden_act in ("silu", "swish")
