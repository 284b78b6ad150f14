"""The members of one shard, from its tar headers alone. Nothing is ever extracted, and only known endings are looked at."""

from __future__ import annotations

import contextlib
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lfq_tokenizer import limits
from stages.data.files import File, OpenFiles, stream
from stages.data.locations import shown
from stages.data.metadata import MEMBER_LIMITS, TEXT_ENDINGS, Read, Shape, Span, picture_ending, read_json, read_shape
from stages.data.walk import UNREAD, is_hidden


@dataclass(frozen=True)
class Known:
    """What was read of a sample beforehand; `shape` None: its header cannot be read."""

    shape: Shape | None
    attributes: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What conditions are about: the attributes and, of a picture, its true `width` and `height`."""
        sides = {} if self.shape is None or self.shape.bits else {"width": self.shape.width, "height": self.shape.height}
        return self.attributes | sides


@dataclass(frozen=True)
class ShardTable:
    """`groups`: key → ending → (offset, size), in the order of the shard. `known` holds metadata by key, where it was read."""

    address: str
    size: int
    groups: dict[str, dict[str, Span]]
    left_out: Counter[str]
    known: dict[str, Known] | None = None


class TarHeaders:
    """A tar file as `tarfile` sees it: it reads headers alone, and none may announce more bytes than any header needs."""

    def __init__(self, source: Any) -> None:
        self.seek, self.tell, self._read = source.seek, source.tell, source.read

    def read(self, size: int) -> bytes:
        if size > limits.TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header announces {size} bytes; at most {limits.TAR_HEADER_BYTES} are read")
        return bytes(self._read(size))


def read_table(address: str, file: File) -> ShardTable:
    """ValueError for a file that is no uncompressed tar; a shard that breaks off keeps its whole samples."""
    groups: dict[str, dict[str, Span]] = {}
    left_out: Counter[str] = Counter()
    try:
        with stream(file) as source, tarfile.open(fileobj=TarHeaders(source), mode="r:") as archive:  # type: ignore[call-overload]
            for member in archive:
                if member.size < 0:
                    # going on would read the same headers again and again
                    raise tarfile.ReadError("negative member size")
                reason, key, ending = _classify(member)
                if not reason and member.offset_data + member.size > file.size:
                    reason = "truncated member"
                if not reason and ending in groups.get(key, {}):
                    reason = "second member of the same name"
                if reason:
                    left_out[reason] += 1
                else:
                    groups.setdefault(key, {})[ending] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError, MemoryError) as error:
        if not groups:
            found = f"{shown(address)} is not an uncompressed tar file ({error})"
            raise ValueError(f"{found}; unpack it, or pack it again") from error
        left_out["truncated shard"] += 1
    return ShardTable(address, file.size, groups, left_out)


def unusable(members: Mapping[str, Span]) -> str:
    """The reason why a group of members is no sample, or ""."""
    if "bits" not in members and picture_ending(members) is None:
        return "sample without picture or bits"
    return "" if any(ending in members for ending in TEXT_ENDINGS) else "sample without caption"


def read_known(table: ShardTable, files: OpenFiles) -> ShardTable:
    """The table with `known` of every usable sample, in one pass through the shard."""
    if table.known is not None:
        return table
    with stream(files.open(table.address)) as source:

        def read(offset: int, size: int) -> bytes:
            source.seek(offset)
            return source.read(size)

        known = {key: _known(members, read) for key, members in table.groups.items() if not unusable(members)}
    return replace(table, known=known)


def _known(members: Mapping[str, Span], read: Read) -> Known:
    attributes: dict[str, Any] = {}
    shape = None
    with contextlib.suppress(ValueError):
        attributes = read_json(members, read)[1]
    with contextlib.suppress(ValueError):
        shape = read_shape(members, read)
    return Known(shape, attributes)


def _classify(member: tarfile.TarInfo) -> tuple[str, str, str]:
    """(reason to leave it out or "", key, ending). A key ends at the first dot of the file name, as in webdataset."""
    if member.isdir():
        return "folder member", "", ""
    if not member.isreg() or member.issparse():
        return "member that is no regular file", "", ""
    if is_hidden(member.name):
        return "member of a hidden or system file", "", ""
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    ending = ending.lower()
    if ending in UNREAD:
        return f"ending .{ending} is not read", "", ""
    if ending not in MEMBER_LIMITS:
        return "member with another ending", "", ""
    if member.size > MEMBER_LIMITS[ending]:
        return "member above the size limit", "", ""
    return "", f"{folder}/{stem}" if folder else stem, ending
