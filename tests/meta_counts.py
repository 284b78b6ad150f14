"""What a run on the meta device would compute, move and launch on a GPU: counted by phase, attention as one kernel.

Operations follow from torch's own formulas (`torch.utils.flop_counter`). Bytes and `products` are those of matrix products,
convolutions and attention: what they read, weights included, and what they write. `launches` are all kernels, uncompiled.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from bitdance.model import BitDanceModel

ATEN = torch.ops.aten
# what a product reads; a bias is nothing beside its matrix
READ = {ATEN.mm.default: (0, 1), ATEN.addmm.default: (1, 2), ATEN.bmm.default: (0, 1), ATEN.convolution.default: (0, 1)}
NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "alias", "detach", "scalar_tensor"}


class Counts(TorchDispatchMode):
    """Inside, everything is added to `phase`. Use `fused_attention` with it."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
            self.product(flops, *(args[i] for i in READ[func]), made)
        elif not _view(func) and func._opname not in NO_KERNEL and any(t.is_meta for t in _tensors((args, made))):
            self.launches[self.phase] += 1
        return made

    def product(self, flops: float, *tensors: Tensor) -> None:
        """One kernel that reads and writes these."""
        self.flops[self.phase] += flops
        self.bytes[self.phase] += sum(tensor.nbytes for tensor in tensors)
        self.products[self.phase] += 1
        self.launches[self.phase] += 1

    def follow(self, model: BitDanceModel) -> None:
        """Phases as in `bitdance.costs.work`: what lies between a backbone call and the projector is the head's."""
        self.phase = "prefill"
        backbone, projector = model.backbone, model.projector
        backbone.register_forward_hook(lambda *_: self._enter("head"))
        projector.register_forward_pre_hook(lambda *_: self._enter("projector"))
        projector.register_forward_hook(lambda *_: self._enter("llm"))

    def _enter(self, phase: str) -> None:
        self.phase = phase


def _view(func: Any) -> bool:
    return any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Kernel(torch.autograd.Function):
    """Shapes of a fused attention: it keeps inputs, output and a number for each query, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        torch.empty_like(sums)  # of the products of output and gradient
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


PLACES = (
    "torch.nn.functional.scaled_dot_product_attention",
    "bitdance.networks.attention.scaled_dot_product_attention",
    "bitdance.networks.attention.flex_attention",
)


@contextmanager
def fused_attention(counts: Counts | None = None) -> Iterator[None]:
    """SDPA and flex_attention, which refuses meta tensors, are one kernel each, added to `counts`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, block_mask: Any = None, **__: Any) -> Tensor:
        assert block_mask is None or block_mask.kv_indices.is_meta
        out = _Kernel.apply(query, key, value)
        if counts:
            heads = (query.shape[0], query.shape[1], *key.shape[2:])  # a key head may serve several of queries
            counts.product(sdpa_flop_count(query.shape, heads, heads), query, key, value, out)
        return out

    with ExitStack() as stack:
        for place in PLACES:
            stack.enter_context(patch(place, attend))
        yield
