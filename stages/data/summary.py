"""What shards hold, in figures and examples: `bitdance data inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from stages.data.shards import Sample, ShardDataset, ShardIndex

VALUES_SHOWN = 50


def summarise(index: ShardIndex, examples: int = 5) -> dict[str, Any]:
    """Counts, attribute values and evenly spread examples, ready for JSON; only the examples are decoded.

    Of samples whose captions or header cannot be read, `unreadable` says how many there are, by reason.
    """
    dataset = ShardDataset(index)
    values: dict[str, Counter[str]] = {}
    unreadable: Counter[str] = Counter()
    captions = 0
    for number in range(len(dataset)):
        known = dataset.readable(dataset.caption, number, unreadable)
        if known is None or dataset.readable(dataset.shape, number, unreadable) is None:
            continue
        texts, attributes = known
        captions += len(texts)
        for name, value in attributes.items():
            if isinstance(value, (str, int, float, bool)):
                values.setdefault(name, Counter())[str(value)] += 1
    shown = [_example(sample) for number in _spread(len(dataset), examples) if (sample := _whole(dataset, number, unreadable))]
    dataset.close()
    return {
        "samples": len(index),
        "captions": captions,
        "shards": [shard.name for shard in index.shards],
        "bytes": sum(shard.size for shard in index.shards),
        "hash": index.hash,
        "left_out": index.left_out,
        "unreadable": dict(unreadable.most_common()),
        "attributes": {name: dict(counter.most_common(VALUES_SHOWN)) for name, counter in values.items()},
        "distinct": {name: len(counter) for name, counter in values.items()},
        "examples": shown,
    }


def _spread(length: int, count: int) -> Iterable[int]:
    return [number * length // count for number in range(min(count, length))] if count <= length else range(length)


def _whole(dataset: ShardDataset, number: int, unreadable: Counter[str]) -> Sample | None:
    """A sample with its picture, which only now may prove to be broken."""
    known_broken = dataset.key(number) in dataset.broken
    return dataset.readable(dataset.__getitem__, number, None if known_broken else unreadable)


def _example(sample: Sample) -> dict[str, Any]:
    shape = "×".join(map(str, sample.picture.size)) if sample.picture is not None else None
    bits = list(sample.bits_Chw.shape) if sample.bits_Chw is not None else None
    return {
        "key": sample.key,
        "picture": shape,
        "bits": bits,
        "captions": sample.captions,
        "attributes": sample.attributes,
    }
