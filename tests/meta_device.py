"""The meta device as a GPU without numbers: a mode that counts what its host waits for, and refuses what a GPU would refuse.

Tensors on `meta` have a shape, a dtype and a device, and no numbers, so the code runs as on a GPU and takes no time or memory.
Whatever the host wants to know of them is a read, for which on a GPU all queued work has to end first. A copy from the host
makes it wait too, unless the memory is pinned and the copy says `non_blocking`, which only CUDA knows.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default, ATEN._copy_from.default}


class MetaDevice(TorchDispatchMode):
    """Inside, `reads` counts by the place in the code what the host read of the device, and `copies` what it sent there.

    A read gets zeros. RuntimeError where an operation takes tensors of the device and of the host, numbers aside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if tensor.is_meta]
        on_host = [tensor for tensor in tensors if not tensor.is_meta and tensor.ndim]
        if func is ATEN._local_scalar_dense.default and on_device:
            self.reads[_place()] += 1
            return torch.zeros((), dtype=args[0].dtype).item()
        if func in COPIES:
            return self._copied(func, args, kwargs)
        if on_device and on_host:
            raise RuntimeError(f"{func} takes tensors of the device and of the host at {_place()}")
        return func(*args, **kwargs)

    def __enter__(self) -> "MetaDevice":
        self._lists = _Lists(self.copies)
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = (args[0], args[1]) if func is ATEN.copy_.default else (None, args[0])
        device = target.device if target is not None else torch.device(kwargs.get("device") or source.device)
        if source.is_meta and device.type != "meta":
            self.reads[_place()] += 1
            zeros = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return zeros if target is None else target.zero_()
        if not source.is_meta and device.type == "meta":
            self.copies[_place()] += 1
        return func(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """`torch.tensor([…], device=…)` fills memory of the host and copies it, below what a dispatch mode sees."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and made.is_meta:
            self.copies[_place()] += 1
        return made


def _place() -> str:
    """ "bitdance/generate.py:prefix_mask" of the nearest frame in this project."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent.name != "tests" and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
