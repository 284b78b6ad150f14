"""A `StoredModel` → a new model folder: whole or not at all, in the memory of a few pieces of one tensor.

Everything is written to a folder beside the destination, which gets its name by one rename when all of it is on disk.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdance.folder import diffusers
from bitdance.folder.card import card_text, facts_of
from bitdance.folder.parts import BACKBONE, CARD_FILE, CONVERSION_FILE, DIFFUSERS, EXTRAS_FILE, LM_CONFIG, STEMS
from bitdance.folder.source import KEY_MAP_VERSION, StoredModel
from bitdance.folder.stored import LazyTensor, pieces, write_pieces
from lfq_tokenizer.files import check_room, fsync, whole_folder, write_text
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.text import SHOWN

SHARD_BYTES = 5 * 10**9  # largest file of the backbone; what transformers chose for the published models
Files = dict[str, list[tuple[str, str]]]  # file → (part, tensor) of what it holds
EXPORT_DTYPES = {
    **{name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")},
    **{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32},
}


@dataclass(frozen=True)
class Format:
    """`stems`: part → its weight file without ending. `place`: small file → where it goes. `finish` writes what is its own."""

    name: str
    stems: dict[str, str]
    place: Callable[[str], str]
    finish: Callable[[StoredModel, Path], None]


FORMATS = {
    "official": Format("official", STEMS, lambda name: name, lambda source, folder: None),
    "diffusers": Format("diffusers", diffusers.STEMS, diffusers.place, diffusers.finish),
}


class _NotFinite(Exception):
    """A number was NaN or infinite; whoever catches it looks for all that are."""


def convert(
    source: StoredModel,
    out: Path,
    format: str = "official",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `source` to the new folder `out`. `dtype=None` keeps that of every tensor; then tensors and configs are equal, bit
    for bit.

    ValueError when `out` is not empty, the source lacks a part, the disk is too small, or a number is NaN or infinite (also
    when only `dtype` makes it so: the first ten tensors are named); OSError when the disk fails. Nothing is left behind.
    """
    kind = FORMATS[format]
    if format != "official" and not source.is_pipeline():
        raise ValueError(f"a {format} folder holds a whole model, and {source.folder} a tokenizer alone; use --format official")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder")
    files = _files(source, kind, dtype, shard_bytes)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    check_room(out, _bytes(source, dtype))
    try:
        with whole_folder(out) as folder:
            _write(source, kind, files, folder, dtype)
            write_json(_conversion(source, format, dtype), folder / CONVERSION_FILE)
            for path in folder.rglob("*"):
                if path.is_file():
                    fsync(path)
        fsync(out.absolute().parent)
    except _NotFinite:
        raise ValueError(_offenders(source, dtype)) from None


def _write(source: StoredModel, kind: Format, files: Files, folder: Path, dtype: torch.dtype | None) -> None:
    for path in source.small_files():
        target = folder / kind.place(path.name)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if dtype is not None and BACKBONE in source.parts:
        _name_dtype(folder / kind.place(LM_CONFIG), dtype)
    if extras := source.bitdance_json():
        if source.extras is None:
            shutil.copyfile(source.folder / EXTRAS_FILE, folder / EXTRAS_FILE)
        else:
            write_json(extras, folder / EXTRAS_FILE)
    for file, names in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        tensors = {}
        for part, name in names:
            held = source.parts[part][name]
            tensors[name] = (held.shape, _target(held, dtype), _finite(held, dtype))
        write_pieces(folder / file, tensors)
    stem = kind.stems.get(BACKBONE, "")
    shards = {file: names for file, names in files.items() if file.startswith(f"{stem}-")}
    if shards:
        size = sum(_nbytes(held, dtype) for held in source.parts[BACKBONE].values())
        weight_map = {name: Path(file).name for file, names in shards.items() for _, name in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(index, folder / f"{stem}.safetensors.index.json")
    kind.finish(source, folder)
    if source.is_pipeline():
        dtypes = {str(_target(held, dtype)).removeprefix("torch.") for _, _, held in source.tensors()}
        facts = {**facts_of(source.folder), "format": kind.name, "dtypes": sorted(dtypes)}
        write_text(card_text(source.bitdance_json(), facts), folder / CARD_FILE)


def _files(source: StoredModel, kind: Format, dtype: torch.dtype | None, limit: int) -> Files:
    """File → (part, tensor) of what it will hold. Only the backbone is cut into several files, as the published one is."""
    files: Files = {}
    for part, tensors in source.parts.items():
        shards: list[list[tuple[str, str]]] = [[]]
        size = 0
        for name, held in tensors.items():
            more = _nbytes(held, dtype)
            if part == BACKBONE and shards[-1] and size + more > limit:
                shards.append([])
                size = 0
            shards[-1].append((part, name))
            size += more
        stem, n = kind.stems[part], len(shards)
        for i, names in enumerate(shards, 1):
            files[f"{stem}.safetensors" if n == 1 else f"{stem}-{i:05d}-of-{n:05d}.safetensors"] = names
    return files


def _target(held: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and held.dtype.is_floating_point else held.dtype


def _nbytes(held: LazyTensor, dtype: torch.dtype | None) -> int:
    return prod(held.shape) * _target(held, dtype).itemsize


def _finite(held: LazyTensor, dtype: torch.dtype | None) -> Iterator[Tensor]:
    target = _target(held, dtype)
    for piece in pieces(held):
        piece = piece.to(target)
        if target.is_floating_point and not piece.isfinite().all():
            raise _NotFinite
        yield piece


def _offenders(source: StoredModel, dtype: torch.dtype | None) -> str:
    found, made = [], False
    for part, name, held in source.tensors():
        try:
            for _ in _finite(held, dtype):
                pass
        except _NotFinite:
            made = made or all(bool(piece.isfinite().all()) for piece in pieces(held))
            found.append(f"{DIFFUSERS[part]}/{name}")
            if len(found) > SHOWN:
                break
    listed = ", ".join(found[:SHOWN]) + (", …" if len(found) > SHOWN else "")
    if made:
        return f"numbers too large for {str(dtype).removeprefix('torch.')} in {listed}; use --dtype bf16 or fp32"
    return f"{source.folder} holds NaN or infinite numbers in {listed}; export an older checkpoint"


def _bytes(source: StoredModel, dtype: torch.dtype | None) -> int:
    return sum(_nbytes(held, dtype) for _, _, held in source.tensors()) + sum(p.stat().st_size for p in source.small_files())


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    config, name = read_json(path), str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(key) != name:
        write_json({**config, key: name}, path)


def _conversion(source: StoredModel, format: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Where a folder comes from. No paths and no times: the same source gives the same file."""
    try:
        package = version("bitdance")
    except PackageNotFoundError:  # run from a folder that is not installed
        package = "unknown"
    parts = source.parts.values()
    found = sorted({str(_target(held, dtype)).removeprefix("torch.") for tensors in parts for held in tensors.values()})
    return {
        "format": format,
        "key_map_version": KEY_MAP_VERSION,
        "bitdance_version": package,
        "dtype": found,
        "source": {**source.origin, "tensors_sha256": source.sha256()},
    }
