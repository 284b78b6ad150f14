"""Which sample stands at an index of the endless row: sources by weight, resolutions by the mix. A pure function.

A stream is one source at one resolution. Indices are dealt out to the streams by a pattern that repeats, as even as the weights
allow, and each stream runs through its own samples in epochs. The index alone therefore tells the sample: there is no state to
save, and processes that take different indices never share a sample of one epoch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.data.buckets import Buckets
from stages.data.order import EpochOrder
from stages.data.shards import ShardDataset
from stages.data.skipping import name_skipped

LONGEST_PATTERN = 1000  # indices; shares are rounded to parts of it


@dataclass(frozen=True)
class Source:
    data: ShardDataset
    weight: float = 1.0


@dataclass(frozen=True)
class SampleReference:
    """Names one sample: `number` of source `source`, to be brought to `resolution` (0: in its own size)."""

    source: int
    number: int
    resolution: int


@dataclass(frozen=True)
class _Stream:
    source: int
    resolution: int
    numbers: np.ndarray
    order: EpochOrder


class Mixture:
    """`at(index)` → `SampleReference`. `shares` is what each (source, resolution) gets of the indices.

    `mix` gives resolutions their shares; empty, every sample keeps its own size. Ready-made bits count to the resolution of
    their size, a picture to every one that it can be brought to. ValueError when a resolution of the mix finds no sample, or,
    if they are `optional`, when none of them does.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        mix: Mapping[int, float] | None = None,
        buckets: Buckets | None = None,
        enlarge: float = 1.0,
        optional: bool = False,
    ) -> None:
        self.sources = sources
        self.unused: Counter[str] = Counter()
        if mix and buckets is not None:
            numbers = [self._by_resolution(source.data, buckets, enlarge) for source in sources]
        else:
            mix, numbers = {0: 1.0}, [{0: np.arange(len(source.data))} for source in sources]
        shares: dict[tuple[int, int], float] = {}
        for resolution, share in mix.items():
            having = [i for i, found in enumerate(numbers) if len(found.get(resolution, ()))]
            if share and not having and not (optional and any(len(found) for found in numbers)):
                counts = {r: sum(len(found.get(r, ())) for found in numbers) for r in mix}
                raise ValueError(
                    f"data.mix gives {resolution} pixels a share, but no sample has that size; samples by resolution: {counts}, "
                    f"not used: {dict(self.unused)}. Add such data, or allow data.enlarge"
                )
            weight = sum(sources[i].weight for i in having)
            shares |= {(i, resolution): share * sources[i].weight / weight for i in having if share}
        total = sum(shares.values())
        self.shares = {key: share / total for key, share in shares.items()}
        self._streams = [
            _Stream(i, r, numbers[i][r], EpochOrder(len(numbers[i][r]), _stream_seed(seed, i, r))) for i, r in self.shares
        ]
        self._pattern = spread(list(self.shares.values()))
        turns = np.eye(len(self._streams), dtype=np.int64)[self._pattern]
        self._before = np.concatenate([np.zeros_like(turns[:1]), turns.cumsum(0)])  # of each stream, ahead of each index

    def _by_resolution(self, data: ShardDataset, buckets: Buckets, enlarge: float) -> dict[int, np.ndarray]:
        found: dict[int, list[int]] = {}
        s = buckets.rule.downsampling
        for number in range(len(data)):
            try:
                shape = data.shape(number)
            except ValueError as error:
                self.unused["size cannot be read"] += 1
                name_skipped(dict.fromkeys(getattr(error, "__notes__", ()), str(error)))
                continue
            if shape.bits:
                resolutions = buckets.of_bits(shape.height * s, shape.width * s)
            else:
                resolutions = buckets.reach(shape.height, shape.width, enlarge)
            if not resolutions:
                self.unused["bits of another size" if shape.bits else "picture too small"] += 1
            for resolution in resolutions:
                found.setdefault(resolution, []).append(number)
        return {resolution: np.array(members) for resolution, members in found.items()}

    def __len__(self) -> int:
        """Samples that are in use, once for each resolution."""
        return sum(len(stream.numbers) for stream in self._streams)

    def at(self, index: int) -> SampleReference:
        """The sample at an index, counted from 0 and without end."""
        cycle, position = divmod(index, len(self._pattern))
        k = self._pattern[position]
        turn = cycle * int(self._before[-1, k]) + int(self._before[position, k])
        stream = self._streams[k]
        return SampleReference(stream.source, int(stream.numbers[stream.order.at(turn)]), stream.resolution)

    def size(self, reference: SampleReference, buckets: Buckets) -> tuple[int, int]:
        """Height and width in pixels of a sample's picture as it is trained on. ValueError where its header cannot be read."""
        shape, s = self.sources[reference.source].data.shape(reference.number), buckets.rule.downsampling
        if shape.bits:
            return shape.height * s, shape.width * s
        if reference.resolution:
            return buckets.size_for(reference.resolution, shape.height, shape.width)
        return shape.height, shape.width

    @property
    def hash(self) -> str:
        """Of everything that decides which sample stands where, but for the seed."""
        parts = [[source.data.index.hash, source.weight] for source in self.sources]
        shares = [[*key, share] for key, share in self.shares.items()]
        return hashlib.sha256(json.dumps([parts, shares]).encode()).hexdigest()


def spread(shares: Sequence[float]) -> list[int]:
    """The pattern: who takes each index, as evenly as the shares (of sum 1) allow; as short as it can be exact, or 1,000 long."""
    for length in range(1, LONGEST_PATTERN + 1):
        parts = [share * length for share in shares]
        if all(part > 0.5 and abs(part - round(part)) < 1e-6 for part in parts):
            break
    credit = np.zeros(len(shares))
    pattern = []
    for _ in range(length):
        credit += shares
        k = int(np.argmax(np.round(credit, 9)))
        credit[k] -= 1
        pattern.append(k)
    return pattern


def _stream_seed(seed: int, source: int, resolution: int) -> int:
    return seed if not source and not resolution else (seed * 1009 + source) * 100_003 + resolution
