"""Captioned pictures → webdataset shards. The destination holds a complete pack or nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfq_tokenizer.files import disk_full, sha256, whole_folder
from lfq_tokenizer.text import printable
from stages.data.metadata import MEMBER_LIMITS
from stages.data.sample import CaptionedPicture, PictureSource, Skipped
from stages.data.skipping import name_skipped

MANIFEST = "pack.json"
_KEY = re.compile(r"[A-Za-z0-9_-]+")


class TooManyBad(ValueError):
    """More pictures were unusable than the limit allows; nothing was written."""


@dataclass(frozen=True)
class PackOptions:
    """`max_bad`: the fraction of unusable pictures that is tolerated (always at least 10 pictures)."""

    samples_per_shard: int = 5000
    max_bad: float = 0.01
    overwrite: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard}: give at least 1")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"--max-bad {self.max_bad}: give a fraction from 0 to 1")


def pack(source: PictureSource, destination: str | os.PathLike[str], options: PackOptions = PackOptions()) -> dict[str, Any]:
    """Write `NAME-000000.tar`, … and `pack.json` into the new folder `destination`; returns what `pack.json` holds.

    NAME is the folder's own name. Everything is written in a hidden neighbour and moved in one step; what a killed command left
    there is removed. Raises ValueError when the destination holds anything else, `TooManyBad` above the limit, `DiskFull` when
    there is no room; then `destination` is as before.
    """
    target = check_destination(destination, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_folder(target) as workplace:
            return _write(source, workplace, target.name, options)
    except OSError as error:
        if full := disk_full(error, target):
            raise full from None
        raise


def check_destination(destination: str | os.PathLike[str], options: PackOptions) -> Path:
    """The folder that is meant. ValueError where it holds what is not to be replaced; asked before a source is opened, too, which
    may take minutes."""
    target = Path(os.path.abspath(os.path.expanduser(destination)))
    if target.exists() or target.is_symlink():
        _check_replaceable(target, options.overwrite)
    return target


def _check_replaceable(target: Path, overwrite: bool) -> None:
    empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    ours = target.is_dir() and not target.is_symlink() and (target / MANIFEST).is_file()
    if not empty and not ours:
        raise ValueError(f"{target} exists and is not a pack of ours; choose another folder")
    if ours and not overwrite:
        raise ValueError(f"{target} already holds a pack; choose another folder, or give --overwrite")


def _write(source: PictureSource, folder: Path, name: str, options: PackOptions) -> dict[str, Any]:
    import webdataset

    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    shards: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    seen_keys: set[str] = set()
    writer: Any = None
    stream: Any = None
    in_shard = 0

    def close() -> None:
        nonlocal writer
        if writer is None:
            return
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        path = Path(stream.name)
        shards.append({"name": path.name, "samples": in_shard, "bytes": path.stat().st_size, "sha256": sha256(path)})
        writer = None

    try:
        for item in _with_progress(source, options.progress):
            if isinstance(item, CaptionedPicture):
                item = _checked(item, seen_keys)
            if isinstance(item, Skipped):
                skipped[item.reason] += 1
                examples.setdefault(item.reason, item.name)
                if options.progress:
                    name_skipped({item.name: item.why or item.reason})
                _check_limit(skipped, examples, source.expected, options.max_bad)
                continue
            seen_keys.add(item.key)
            if writer is None or in_shard == options.samples_per_shard:
                close()
                stream = open(folder / f"{stem}-{len(shards):06d}.tar", "wb")  # noqa: SIM115
                # a fixed time and owner: the same pictures give the same bytes
                writer = webdataset.TarWriter(stream, encoder=False, mtime=0.0)
                in_shard = 0
            writer.write(_members(item))
            in_shard += 1
        close()
    finally:
        if writer is not None:
            # only after an error, which says more than a second one from closing would
            with contextlib.suppress(OSError, ValueError):
                writer.close()
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    if not shards:
        raise ValueError(
            f"no usable picture among {sum(skipped.values())} ({_reasons(skipped, examples) or 'the source is empty'})"
        )
    report = {
        "format": 1,
        "name": stem,
        "samples": sum(shard["samples"] for shard in shards),
        "skipped": dict(sorted(skipped.items())),
        "source": source.describe(),
        "shards": shards,
    }
    with open(folder / MANIFEST, "w", encoding="utf-8") as manifest:
        json.dump(report, manifest, indent=1, ensure_ascii=False)
        manifest.flush()
        os.fsync(manifest.fileno())
    return report


def _checked(sample: CaptionedPicture, seen_keys: set[str]) -> CaptionedPicture | Skipped:
    """The sample, or why a reader would not take it."""
    if sample.key in seen_keys:
        return Skipped(sample.key, "duplicate key")
    try:
        size = len(_text(sample))
    except UnicodeEncodeError:
        return Skipped(sample.key, "caption is no valid text")
    return sample if size <= MEMBER_LIMITS["json"] else Skipped(sample.key, "captions too long")


def _text(sample: CaptionedPicture) -> bytes:
    text = json.dumps({"captions": sample.captions, "attributes": sample.attributes}, ensure_ascii=False)
    return text.encode("utf-8")


def _members(sample: CaptionedPicture) -> dict[str, Any]:
    assert _KEY.fullmatch(sample.key), f"key {sample.key!r} may hold letters, digits, - and _ only"
    assert sample.captions, f"{sample.key} has no caption"
    data = sample.encoded
    if data is None:
        assert sample.picture is not None
        assert sample.picture.mode == "RGB", f"{sample.key} is {sample.picture.mode}, not RGB"
        buffer = io.BytesIO()
        sample.picture.save(buffer, format="PNG")
        data = buffer.getvalue()
    more = {} if sample.targets is None else {"targets": sample.targets}
    return {"__key__": sample.key, sample.ending if sample.encoded is not None else "png": data, "json": _text(sample), **more}


def _check_limit(skipped: Counter[str], examples: dict[str, str], expected: int, max_bad: float) -> None:
    limit = max(10, int(max_bad * expected))
    if sum(skipped.values()) > limit:
        raise TooManyBad(
            f"more than {limit} of {expected} pictures are unusable ({_reasons(skipped, examples)}); "
            "mend them, or raise --max-bad"
        )


def _reasons(skipped: Counter[str], examples: dict[str, str]) -> str:
    return ", ".join(f"{count} {reason}, e.g. {printable(examples[reason])}" for reason, count in skipped.most_common())


def _with_progress(source: PictureSource, progress: bool) -> Any:
    if not progress or not sys.stderr.isatty():
        return source
    from tqdm import tqdm

    return tqdm(source, total=source.expected, unit="picture", smoothing=0.05)
