"""`.pt` and `.pth` files of strangers: looked through before they are read, so that a small file cannot become gigabytes.

A pickle is a program. This one may name tensors, plain containers and what the caller allows; it may run for so many steps; and
the tensors in it are held against the bytes of the file. What passes is read by torch's own restricted reader.
"""

import contextlib
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lfq_tokenizer import limits
from lfq_tokenizer.files import size_text
from lfq_tokenizer.text import printable

# bytearray and _codecs.encode, which torch allows, are not among them: both make much out of little
_PLAIN = {"collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "torch.serialization._get_layout"}
_PLAIN |= {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter", "sparse_tensor")}
_PLAIN |= {f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")}
_PLAIN |= {f"torch.{dtype}" for dtype in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8")}
_PLAIN |= {"torch.uint8", "torch.bool", "torch.BoolStorage", "torch.storage.UntypedStorage"}
_LEGACY_PARTS = 5  # magic number, version, system, content, names of the storages
_OTHER = ("INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "BYTEARRAY8", "NEXT_BUFFER")  # instructions that no such file needs
_SHARING = 4  # times the bytes of the file that its tensors may have together, where several look at the same numbers


class Refused(ValueError):
    """A file whose pickle asks for more than tensors: `named` is what it asks for."""

    def __init__(self, named: str) -> None:
        super().__init__(f"it asks for {printable(named)[:200]}")
        self.named = named


def read_torch(path: Path, *allowed: type, mmap: bool = False) -> Any:
    """The content of a `.pt` or `.pth` file, on the CPU. `allowed`: classes that may be built beside tensors and containers.

    `Refused` for a pickle that names anything else; ValueError for one beyond the limits, for a compressed archive, for
    tensors that claim more numbers than the file has, and for a broken file.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    names = _PLAIN | {f"{kind.__module__}.{kind.__qualname__}" for kind in allowed}
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # by the same sign as torch
        file.seek(0)
        for _ in range(0 if zipped else _LEGACY_PARTS):
            check_pickle(file, names)
    if zipped:
        _check_archive(path, names)
    with _only(*allowed):
        content = torch.load(path, map_location="cpu", weights_only=True, **({"mmap": True} if mmap and zipped else {}))
    _check_tensors(content, path)
    return content


def check_pickle(file: IO[bytes], names: set[str] | None, most: int = limits.PICKLE_BYTES) -> None:
    """Look through one pickle, up to its end. `Refused` where it names what is not in `names` ("module.name"; None: its reader
    looks at that itself); ValueError where it is broken, longer than `most` bytes, runs for too many steps or would make a
    table larger than itself."""
    start = file.tell()
    for steps, (opcode, argument, _) in enumerate(pickletools.genops(file), 1):
        if steps > limits.PICKLE_STEPS or file.tell() - start > most:
            found = f"{limits.PICKLE_STEPS:,} steps or {size_text(most)}"
            raise ValueError(f"its pickle has more than {found} (BITDANCE_LIMIT_PICKLE_STEPS, _BYTES)")
        if opcode.name == "GLOBAL" and names is not None:
            named = str(argument).replace(" ", ".")
            if named not in names:
                raise Refused(named)
        elif opcode.name in _OTHER or (opcode.name == "STACK_GLOBAL" and names is not None):
            raise ValueError(f"its pickle holds the instruction {opcode.name}, which no file of tensors needs")
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > 2 * steps + 1000:
            raise ValueError("its pickle puts a value at a place far beyond its own length")


def _check_archive(path: Path, names: set[str]) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its archive is compressed, which torch never writes and which may hide any size")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its archive claims more bytes than the file has")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                if entry.file_size > limits.PICKLE_BYTES:
                    allowed = f"at most {size_text(limits.PICKLE_BYTES)} are read"
                    raise ValueError(f"its pickle has {size_text(entry.file_size)}; {allowed}")
                with archive.open(entry) as file:
                    check_pickle(file, names)


def _check_tensors(content: Any, path: Path) -> None:
    """ValueError where the tensors, written out, need more bytes than the file has: strides of 0, or one storage many times."""
    size, needed, seen, waiting = path.stat().st_size, 0, set[int](), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            distinct = (value.data_ptr(), tuple(value.shape), value.stride()) if value.layout == torch.strided else id(value)
            if hash(distinct) not in seen:
                seen.add(hash(distinct))
                needed += value.numel() * value.element_size()
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
        if needed > _SHARING * size:
            raise ValueError(f"its tensors, written out, need {size_text(needed)} or more; the file has {size_text(size)}")


@contextlib.contextmanager
def _only(*classes: type) -> Iterator[None]:
    """What torch's restricted reader may build beside tensors; what other packages have added to its list does not count here."""
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(classes))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
