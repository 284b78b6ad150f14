"""An index of webdataset shards, local or remote: random access to every sample.

The members' offsets are listed once, from the tar headers alone or from an index file; a sample is then read from its place
in the file. Nothing is ever extracted or un-pickled, and only members with known endings are read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import Dataset

from lfq_tokenizer.text import printable
from stages.data.bits import unpack_bits
from stages.data.conditions import Condition, first_failure
from stages.data.entries import Entries, Entry
from stages.data.files import OpenFiles
from stages.data.index_file import open_tables
from stages.data.locations import Locations, find_shards, name_of
from stages.data.metadata import Read, Shape, picture_ending, read_shape, read_text
from stages.data.picture import BrokenPicture, decode_picture
from stages.data.skipping import Skips, name_skipped
from stages.data.table import read_known, unusable

T = TypeVar("T")

_HEADER = 2 * tarfile.BLOCKSIZE  # with the filling before it


@dataclass(frozen=True)
class Sample:
    """`picture` RGB or None; `bits_Chw` int8 ±1 or None; at least one of them is given. `targets`: what a teacher predicts of it,
    as bytes that its writer understands."""

    key: str
    picture: Image.Image | None
    bits_Chw: torch.Tensor | None
    captions: list[str]
    attributes: dict[str, Any]
    targets: bytes | None = None


@dataclass(frozen=True)
class Shard:
    """A tar file: its path or URL, and its size in bytes when it was indexed."""

    address: str
    size: int

    @property
    def name(self) -> str:
        return name_of(self.address)


@dataclass(frozen=True)
class ShardIndex:
    """All usable samples of a list of shards.

    `left_out` counts by reason what was not taken; `hash` is SHA-256 over the shards' names, sizes and member tables, and over
    the conditions and what they keep: a run that resumes compares it.
    """

    shards: tuple[Shard, ...]
    entries: Entries
    left_out: dict[str, int]
    hash: str

    @classmethod
    def open(cls, places: Locations, keep: Sequence[str] = ()) -> ShardIndex:
        """Shard files, patterns, folders, URLs or index files → index of the samples that meet all conditions of `keep`.

        ValueError for a compressed or foreign file, a URL that is not allowed, and where no sample is left; FileNotFoundError
        where a place matches nothing, other OSErrors where a file cannot be read.
        """
        conditions = [Condition.parse(text) for text in keep]
        digest, kept = hashlib.sha256(), hashlib.sha256()
        shards: list[Shard] = []
        entries = Entries()
        left_out: Counter[str] = Counter()
        with contextlib.closing(OpenFiles()) as files:
            for table in open_tables(find_shards(places), files):
                shard = Shard(table.address, table.size)
                digest.update(json.dumps([shard.name, shard.size, list(table.groups.items())]).encode())
                left_out.update(table.left_out)
                if conditions:
                    table = read_known(table, files)
                for key, members in table.groups.items():
                    known = table.known.get(key) if table.known else None
                    reason = unusable(members) or (first_failure(conditions, known.facts) if conditions and known else "")
                    if reason:
                        left_out[reason] += 1
                    else:
                        entries.append(len(shards), key, members, known.shape if known else None)
                        if conditions:
                            kept.update(json.dumps([len(shards), key]).encode())
                shards.append(shard)
        if conditions:
            digest.update(json.dumps([sorted(condition.text for condition in conditions), kept.hexdigest()]).encode())
        if not entries:
            counts = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "they are empty"
            remedy = "change data.keep or the shards" if conditions else "pack them again"
            raise ValueError(f"no usable sample in {len(shards)} shards ({counts}); {remedy}")
        return cls(tuple(shards), entries, dict(sorted(left_out.items())), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.entries)


class ShardDataset(Dataset[Sample]):
    """`dataset[i]` → `Sample`, read from its place; safe with loader workers: every process opens its own files.

    Raises ValueError naming shard and key for a sample that cannot be read (`BrokenPicture` is one). `accept`, where it is
    given, raises ValueError for a sample that is of no use.
    """

    def __init__(self, index: ShardIndex, accept: Callable[[Sample], object] | None = None) -> None:
        self.index = index
        self.accept = accept
        self._broken: dict[int, str] = {}  # number → why, of the samples that were left out
        self._files = OpenFiles()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample:
        entry = self.index.entries[number]
        with self._naming(entry):
            read = self._together(entry)
            captions, attributes = read_text(entry.members, read)
            ending = picture_ending(entry.members)
            picture = decode_picture(read(*entry.members[ending])) if ending else None
            bits_Chw = unpack_bits(read(*entry.members["bits"])) if "bits" in entry.members else None
            targets = read(*entry.members["targets"]) if "targets" in entry.members else None
            sample = Sample(entry.key, picture, bits_Chw, captions, attributes, targets)
            if self.accept is not None:
                self.accept(sample)
            return sample

    def key(self, number: int) -> str:
        """The key of a sample; nothing is read."""
        return self.index.entries.key(number)

    def name(self, number: int) -> str:
        """Key and shard of a sample, for messages; nothing is read."""
        entry = self.index.entries[number]
        return f"sample {entry.key} in {self.index.shards[entry.shard].name}"

    def shape(self, number: int) -> Shape:
        """Height and width of a sample, from headers alone: in tokens where it has bits, else in pixels.

        ValueError where the header cannot be read.
        """
        known = self.index.entries.shape(number)
        if known is not None:
            return known
        entry = self.index.entries[number]
        with self._naming(entry):
            return read_shape(entry.members, self._reader(entry))

    def caption(self, number: int) -> tuple[list[str], dict[str, Any]]:
        """Captions and attributes of a sample, without decoding its picture. ValueError where they cannot be read."""
        entry = self.index.entries[number]
        with self._naming(entry):
            return read_text(entry.members, self._reader(entry))

    def readable(self, read: Callable[[int], T], number: int, skipped: Counter[str] | None = None) -> T | None:
        """`read(number)`, one of the readers above; None for a sample that cannot be read, which is noted as in `take`."""
        try:
            return read(number)
        except ValueError as error:
            self._note(number, error, skipped)
            return None

    def take(self, number: int, skipped: Counter[str] | None = None) -> Sample:
        """Sample `number` or, where it cannot be read, the next one that can: what training asks for.

        Depends on the data alone, so a resumed run takes the same samples. Skipped ones are counted by reason in `skipped`, each
        time, and named once on standard error, or in the names of `skipped` where that keeps any (`Skips`). ValueError when more
        than 1 % of the samples (and more than 10) are broken. A shard that cannot be reached (`RemoteError`) or was changed
        (`ChangedShard`) is no broken sample: it is raised.
        """
        limit = max(10, len(self) // 100)
        for step in range(len(self)):
            place = (number + step) % len(self)
            sample = self.readable(self.__getitem__, place, skipped)
            if sample is not None:
                return sample
            if len(self._broken) > limit:
                break
        listed = "; ".join(f"{key}: {reason}" for key, reason in list(self.broken.items())[:10])
        found = f"{len(self._broken)} of {len(self)} samples cannot be read, more than {limit}"
        raise ValueError(f"{found}: {printable(listed)}. Pack them again.")

    @property
    def broken(self) -> dict[str, str]:
        """Key → why, of the samples that were left out so far."""
        return {self.key(number): why for number, why in self._broken.items()}

    def _note(self, number: int, error: ValueError, skipped: Counter[str] | None) -> None:
        self._broken[number] = str(error)
        if isinstance(skipped, Skips):
            skipped.note(self.name(number), _reason(error), str(error))
            return
        if skipped is not None:
            skipped[_reason(error)] += 1
        name_skipped({self.name(number): str(error)})

    def close(self) -> None:
        """Close the files of this process; a later read opens them again."""
        self._files.close()

    def _together(self, entry: Entry) -> Read:
        """One request for all members of a sample, where nothing but headers lies between them."""
        read = self._reader(entry)
        start = min(offset for offset, _ in entry.members.values())
        end = max(offset + size for offset, size in entry.members.values())
        between = end - start - sum(size for _, size in entry.members.values())
        if between > _HEADER * (len(entry.members) - 1):
            return read
        data = read(start, end - start)
        return lambda offset, size: data[offset - start : offset - start + size]

    def _reader(self, entry: Entry) -> Read:
        shard = self.index.shards[entry.shard]
        return functools.partial(self._files.read, shard.address, shard.size)

    @contextlib.contextmanager
    def _naming(self, entry: Entry) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            error.add_note(f"sample {entry.key} in {self.index.shards[entry.shard].name}")  # as `name` says it
            raise


def _reason(error: ValueError) -> str:
    if isinstance(error, BrokenPicture):
        return f"picture {error.reason}"
    return str(getattr(error, "reason", "bits unreadable"))
