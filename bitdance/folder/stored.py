"""Tensors in safetensors files, in pieces: a tensor of gigabytes passes through a few megabytes of memory.

Files are not mapped into memory, whose pages would count as the reader's until the system takes them back.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitdance.folder.parts import weight_files
from lfq_tokenizer.files import whole_file
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import read_shapes, read_weight_map

PIECE = 2**22  # numbers that are in memory at a time
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class LazyTensor(Protocol):
    """A tensor that lies somewhere. `read(start, stop)` gives these numbers of its flattened form, on the CPU."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file; `offset` is where its bytes begin."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        data = bytearray((stop - start) * self.dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise ValueError(f"{self.path} ended while it was read; is something writing to it?")
        return torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)


def pieces(held: LazyTensor) -> Iterator[Tensor]:
    """All numbers of a tensor, `PIECE` at a time."""
    size = prod(held.shape)
    for start in range(0, size, PIECE):
        yield held.read(start, min(start + PIECE, size))


def open_stored(path: Path) -> dict[str, StoredTensor]:
    """Name → tensor of a file, by its header. FileNotFoundError or ValueError name the file."""
    header, data = _header(path)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; only {', '.join(SAFETENSORS_DTYPES)} are read")
        begin = data + entry["data_offsets"][0]
        found[name] = StoredTensor(path, begin, tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
    return found


def stored_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Name → tensor of the part whose files begin with `stem`. ValueError where an index names what its files do not hold."""
    files = {path.name: open_stored(path) for path in weight_files(folder, stem)}
    if f"{stem}.safetensors" not in files:
        index = folder / f"{stem}.safetensors.index.json"
        if lost := [f"{name} in {file}" for name, file in read_weight_map(index).items() if name not in files[file]]:
            raise ValueError(f"{index} names weights that its files do not hold: {listed(lost)}")
    return {name: stored for tensors in files.values() for name, stored in tensors.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What a file's header says beside its tensors."""
    metadata: dict[str, str] = _header(path)[0].get("__metadata__", {})
    return metadata


def _header(path: Path) -> tuple[dict[str, Any], int]:
    read_shapes(path)  # the library's own checks: header, offsets, length of the file
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def write_pieces(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, Iterable[Tensor]]]) -> None:
    """Write name → (shape, dtype, pieces) as one safetensors file, byte for byte as the library's `save_file` does."""
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype, _ = tensors[name]
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            shape, dtype, parts = tensors[name]
            written = 0
            for part in parts:
                assert part.dtype == dtype
                written += file.write(part.contiguous().view(torch.uint8).numpy())
            assert written == prod(shape) * dtype.itemsize, f"{name}: {written} bytes for shape {shape}"
