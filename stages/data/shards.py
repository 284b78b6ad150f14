"""An index of webdataset shards: random access, and a data position that is one number.

The members' offsets are listed once, from the tar headers alone; a sample is then read from its place in the file.
Nothing is ever extracted or un-pickled, and only members with the endings below are read.

`EpochOrder.batch` is a pure function of the seed and the step. **Saving the step number is saving the data position**:
after a restart, at any number of loader workers, step n yields the samples that it would have yielded.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from stages.data.bits import unpack_bits
from stages.data.conditions import Condition, first_failure
from stages.data.metadata import (
    MEMBER_LIMITS,
    PICTURE_ENDINGS,
    TEXT_ENDINGS,
    BrokenCaption,
    Place,
    Read,
    Shape,
    picture_ending,
    read_json,
    read_shape,
    read_text,
)
from stages.data.picture import MAX_PIXELS, BrokenPicture, decode_picture

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_OPEN_FILES = 32


@dataclass(frozen=True)
class Entry:
    """Where a sample lies: its shard, and (offset, size) of each member by ending."""

    shard: int
    key: str
    members: dict[str, Place]


@dataclass(frozen=True)
class Sample:
    """`picture` RGB or None; `bits_Chw` int8 ±1 or None; at least one of them is given."""

    key: str
    picture: Image.Image | None
    bits_Chw: torch.Tensor | None
    captions: list[str]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ShardIndex:
    """All usable samples of a list of shards.

    `left_out` counts by reason what was not taken; `hash` is SHA-256 over the shards' names, sizes and member tables: a
    run that resumes compares it.
    """

    shards: tuple[Path, ...]
    entries: tuple[Entry, ...]
    left_out: dict[str, int]
    hash: str

    @classmethod
    def open(cls, places: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], keep: Sequence[str] = ()) -> ShardIndex:
        """Shard files, glob patterns, or folders of shards → index of the samples that meet all conditions of `keep`.

        ValueError for a URL of any scheme, a compressed or foreign file, and where no sample is usable;
        FileNotFoundError where a place matches nothing.
        """
        conditions = [Condition.parse(text) for text in keep]
        shards = _resolve(places)
        digest = hashlib.sha256()
        entries: list[Entry] = []
        left_out: Counter[str] = Counter()
        for number, path in enumerate(shards):
            groups = _read_headers(path, left_out)
            digest.update(json.dumps([path.name, path.stat().st_size, list(groups.items())]).encode())
            for key, members in groups.items():
                if not any(ending in members for ending in (*PICTURE_ENDINGS, "bits")):
                    left_out["sample without picture or bits"] += 1
                elif not any(ending in members for ending in TEXT_ENDINGS):
                    left_out["sample without caption"] += 1
                else:
                    entries.append(Entry(number, key, members))
        if conditions:
            entries = _meeting(conditions, shards, entries, left_out)
            digest.update(json.dumps([sorted(condition.text for condition in conditions), [e.key for e in entries]]).encode())
        if not entries:
            raise ValueError(f"no usable sample in {len(shards)} shards ({_counts(left_out)}); pack them again")
        return cls(tuple(shards), tuple(entries), dict(sorted(left_out.items())), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.entries)


def _resolve(places: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    found: dict[Path, None] = {}
    for place in [places] if isinstance(places, (str, os.PathLike)) else places:
        text = os.path.expanduser(os.fspath(place))
        if _SCHEME.match(text):
            raise ValueError(
                f"shards {text!r}: only files of this machine are read, no URL and no command; download them first"
            )
        if os.path.isdir(text):
            matches = sorted(glob.glob(os.path.join(glob.escape(text), "*.tar")))
        else:
            matches = [text] if os.path.isfile(text) else sorted(glob.glob(text))
        if not matches:
            raise FileNotFoundError(
                f"no shard at {text!r}; give .tar files, a pattern such as 'shards/*.tar', or a folder of shards"
            )
        found.update(dict.fromkeys(Path(match) for match in matches))
    if not found:
        raise FileNotFoundError("no shards were named; give .tar files, a pattern, or a folder of shards")
    return list(found)


def _read_headers(path: Path, left_out: Counter[str]) -> dict[str, dict[str, Place]]:
    """key → ending → (offset, size), from the headers of one shard."""
    size = path.stat().st_size
    groups: dict[str, dict[str, Place]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.size < 0:
                    # going on would read the same headers again and again
                    raise tarfile.ReadError("negative member size")
                reason, key, ending = _classify(member)
                if not reason and member.offset_data + member.size > size:
                    reason = "truncated member"
                if not reason and ending in groups.get(key, {}):
                    reason = "second member of the same name"
                if reason:
                    left_out[reason] += 1
                else:
                    groups.setdefault(key, {})[ending] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if not groups:
            raise ValueError(
                f"{path} is not an uncompressed tar file ({error}); unpack it, or pack it again"
            ) from error
        left_out["truncated shard"] += 1
    return groups


def _meeting(
    conditions: Sequence[Condition], shards: Sequence[Path], entries: Sequence[Entry], left_out: Counter[str]
) -> list[Entry]:
    files = ShardFiles(shards)
    kept = []
    for entry in entries:
        read = files.reader(entry.shard)
        try:
            attributes = read_json(entry.members, read)[1]
            if any(condition.name in ("width", "height") for condition in conditions) and "bits" not in entry.members:
                shape = read_shape(entry.members, attributes, read)
                attributes = {"width": shape.width, "height": shape.height, **attributes}
            reason = first_failure(conditions, attributes)
        except ValueError:
            reason = "sample without readable attributes"
        if reason:
            left_out[reason] += 1
        else:
            kept.append(entry)
    files.close()
    return kept


def _classify(member: tarfile.TarInfo) -> tuple[str, str, str]:
    """(reason to leave it out or "", key, ending). A key ends at the first dot of the file name, as in webdataset."""
    if member.isdir():
        return "folder member", "", ""
    if not member.isreg() or member.issparse():
        return "member that is no regular file", "", ""
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    ending = ending.lower()
    if ending not in MEMBER_LIMITS:
        return "member with another ending", "", ""
    if member.size > MEMBER_LIMITS[ending]:
        return "member above the size limit", "", ""
    return "", f"{folder}/{stem}" if folder else stem, ending


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "they are empty"


class ShardFiles:
    """The open files of shards; every process opens its own."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def reader(self, shard: int) -> Read:
        return functools.partial(self.read, shard)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. ValueError where the shard ends before."""
        data = b""
        while len(data) < size:
            piece = os.pread(self._file(shard), size - len(data), offset + len(data))
            if not piece:
                raise ValueError(f"{self.shards[shard].name} ends within a member; it was changed after it was indexed")
            data += piece
        return data

    def _file(self, shard: int) -> int:
        if self._process != os.getpid():
            # handles of the parent belong to the parent
            self._files, self._process = OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) == _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the files of this process; a later read opens them again."""
        if self._process == os.getpid():
            for handle in self._files.values():
                os.close(handle)
        self._files = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict(), "_process": -1}


class ShardDataset(Dataset[Sample]):
    """`dataset[i]` → `Sample`, read from its place; safe with loader workers: every process opens its own files.

    Raises ValueError naming shard and key for a sample that cannot be read (`BrokenPicture` is one).
    """

    def __init__(self, index: ShardIndex, max_pixels: int = MAX_PIXELS) -> None:
        self.index = index
        self.max_pixels = max_pixels
        self.broken: dict[str, str] = {}  # key → why, of the samples that `take` has skipped
        self._files = ShardFiles(index.shards)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample:
        entry = self.index.entries[number]
        with self._naming(entry):
            captions, attributes = read_text(entry.members, self._files.reader(entry.shard))
            ending = picture_ending(entry.members)
            picture = decode_picture(self._read(entry, ending), self.max_pixels) if ending else None
            bits_Chw = unpack_bits(self._read(entry, "bits")) if "bits" in entry.members else None
        return Sample(entry.key, picture, bits_Chw, captions, attributes)

    def key(self, number: int) -> str:
        """The name of a sample; nothing is read."""
        return self.index.entries[number].key

    def shape(self, number: int) -> Shape:
        """Height and width of a sample, from headers alone: in tokens where it has bits, else in pixels.

        Attributes `width` and `height` are believed. ValueError where the header cannot be read.
        """
        entry = self.index.entries[number]
        read = self._files.reader(entry.shard)
        with self._naming(entry):
            return read_shape(entry.members, read_json(entry.members, read)[1], read)

    def take(self, number: int, skipped: Counter[str] | None = None) -> Sample:
        """Sample `number` or, where it cannot be read, the next one that can: what training asks for.

        Depends on the data alone, so a resumed run takes the same samples. Skipped ones are noted in `broken` and counted by
        reason in `skipped`, each time; ValueError when more than 1 % of the samples (and more than 10) are broken.
        """
        limit = max(10, len(self) // 100)
        for step in range(len(self)):
            place = (number + step) % len(self)
            try:
                return self[place]
            except ValueError as error:
                self.broken[self.key(place)] = str(error)
                if skipped is not None:
                    skipped[_reason(error)] += 1
                if len(self.broken) > limit:
                    break
        listed = "; ".join(f"{key}: {reason}" for key, reason in list(self.broken.items())[:10])
        found = f"{len(self.broken)} of {len(self)} samples cannot be read, more than {limit}"
        raise ValueError(f"{found}: {listed}. Pack them again.")

    def caption(self, number: int) -> tuple[list[str], dict[str, Any]]:
        """Captions and attributes of a sample, without decoding its picture."""
        entry = self.index.entries[number]
        return read_text(entry.members, self._files.reader(entry.shard))

    def close(self) -> None:
        """Close the files of this process; a later read opens them again."""
        self._files.close()

    def _read(self, entry: Entry, ending: str) -> bytes:
        return self._files.read(entry.shard, *entry.members[ending])

    @contextlib.contextmanager
    def _naming(self, entry: Entry) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            error.add_note(f"sample {entry.key} in {self.index.shards[entry.shard].name}")
            raise


def _reason(error: ValueError) -> str:
    if isinstance(error, BrokenPicture):
        return f"picture {error.reason}"
    return "caption unreadable" if isinstance(error, BrokenCaption) else "bits unreadable"


class EpochOrder:
    """Which samples step n of rank r takes: a fresh permutation every epoch, disjoint between ranks.

    The epochs' permutations stand in one endless row; a step takes the next `batch_size * world` of it, and a rank its
    part of these. Within an epoch every sample therefore comes exactly once over all ranks; a batch may reach from one
    epoch into the next. The same numbers of samples per step over more ranks give the same samples.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if length < 1 or seed < 0 or not 0 <= rank < world:
            raise ValueError(f"length {length} and seed {seed} must be positive, and rank {rank} below world {world}")
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self._permutations: OrderedDict[int, torch.Tensor] = OrderedDict()

    def batch(self, step: int, batch_size: int) -> list[int]:
        """Sample numbers of (micro-)step `step`, counted from 0: a pure function of the seed and the arguments."""
        if step < 0 or batch_size < 1:
            raise ValueError(f"step {step} must be at least 0 and batch_size {batch_size} at least 1")
        first = (step * self.world + self.rank) * batch_size
        return [
            int(self._permutation(place // self.length)[place % self.length])
            for place in range(first, first + batch_size)
        ]

    def epoch(self, step: int, batch_size: int) -> float:
        """How often the data was seen before `step`."""
        return step * self.world * batch_size / self.length

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:
                self._permutations.popitem(last=False)
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._permutations[epoch] = torch.randperm(self.length, generator=generator)
        return self._permutations[epoch]
