"""The table of samples: where each one lies, in flat arrays. A sample costs about 70 bytes and the length of its key."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from stages.data.metadata import MEMBER_LIMITS, Shape, Span

_ENDINGS = tuple(MEMBER_LIMITS)


@dataclass(frozen=True)
class Entry:
    """Where a sample lies: the number of its shard, and (offset, size) of each member by ending. `shape` where it is known."""

    shard: int
    key: str
    members: dict[str, Span]
    shape: Shape | None = None


class Entries(Sequence[Entry]):
    """A sequence of `Entry` that grows at its end; entries are made when they are asked for."""

    def __init__(self) -> None:
        self._shards = array("i")
        self._keys, self._key_ends = bytearray(), array("q", [0])
        self._endings, self._offsets, self._sizes = array("B"), array("q"), array("i")
        self._member_ends = array("q", [0])
        self._sides = array("i")  # height and width, below 0 for bits; 0: not known

    def append(self, shard: int, key: str, members: Mapping[str, Span], shape: Shape | None) -> None:
        self._shards.append(shard)
        # names from a tar may hold bytes that are no text
        self._keys += key.encode("utf-8", "surrogatepass")
        self._key_ends.append(len(self._keys))
        for ending, (offset, size) in members.items():
            self._endings.append(_ENDINGS.index(ending))
            self._offsets.append(offset)
            self._sizes.append(size)
        self._member_ends.append(len(self._endings))
        sign = -1 if shape and shape.bits else 1
        self._sides.extend((sign * shape.height, sign * shape.width) if shape else (0, 0))

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, number: int) -> Entry: ...

    @overload
    def __getitem__(self, number: slice) -> list[Entry]: ...

    def __getitem__(self, number: int | slice) -> Entry | list[Entry]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        members = {
            _ENDINGS[self._endings[place]]: (self._offsets[place], self._sizes[place])
            for place in range(self._member_ends[number], self._member_ends[number + 1])
        }
        return Entry(self._shards[number], self.key(number), members, self.shape(number))

    def key(self, number: int) -> str:
        number = range(len(self))[number]
        return self._keys[self._key_ends[number] : self._key_ends[number + 1]].decode("utf-8", "surrogatepass")

    def shape(self, number: int) -> Shape | None:
        number = range(len(self))[number]
        height, width = self._sides[2 * number], self._sides[2 * number + 1]
        return Shape(abs(height), abs(width), height < 0) if height else None
