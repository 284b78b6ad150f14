"""Index files: the member tables and metadata of shards, so that a large or remote data set is opened without reading it.

One JSON object a line: `{"format", "version"}`; for each shard `{"name", "size", "left_out", "samples"}`, where `samples` lists
`[key, {ending: [offset, size]}, [height, width] or null, attributes]` for each group of members; last `{"shards": count}`. A
shard lies where its name says: below the index file's folder or, where the name is absolute, elsewhere.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from lfq_tokenizer import limits
from lfq_tokenizer.files import clear_leftovers, size_text, whole_file
from stages.data.files import OpenFiles, stream
from stages.data.locations import INDEX_ENDING, Locations, beside, find_shards, is_url, name_of, shown
from stages.data.metadata import LONGEST_SIDE, MEMBER_LIMITS, Shape, Span
from stages.data.skipping import name_skipped
from stages.data.table import Known, ShardTable, read_known, read_table, unusable

FORMAT = "bitdance shards"
VERSION = 1


def open_tables(addresses: Sequence[str], files: OpenFiles) -> Iterator[ShardTable]:
    """The tables of shards and of those that index files name, one after the other."""
    for address in addresses:
        if shown(address).endswith(INDEX_ENDING):
            yield from read_index(address, files)
        else:
            yield read_table(address, files.open(address))


def write_index(places: Locations, out: str | os.PathLike[str], progress: bool = False) -> dict[str, Any]:
    """Read headers and metadata of all shards and write the index file `out`, at once; returns counts.

    Shards in the folder of `out` or below are named relative to it, others absolutely. ValueError for another ending than
    `.jsonl`, and where `out` is a file of another kind.
    """
    target = Path(os.path.abspath(os.path.expanduser(out)))
    if target.suffix != INDEX_ENDING or is_url(os.fspath(out)):
        raise ValueError(f"{out}: give the index file a path on this machine that ends with {INDEX_ENDING}")
    if target.exists() and not _is_index(target):
        raise ValueError(f"{target} exists and is no index file; choose another name")
    files = OpenFiles()
    shards, samples, unreadable, left_out = 0, 0, 0, Counter[str]()
    clear_leftovers(target.parent, target.name)
    try:
        with whole_file(target) as stream:
            _write_line(stream, {"format": FORMAT, "version": VERSION})
            for table in tqdm(open_tables(find_shards(places), files), unit="shard", disable=None if progress else True):
                table = read_known(table, files)
                assert table.known is not None
                _write_line(stream, _to_json(table, target.parent))
                shards += 1
                samples += len(table.known)
                broken = [key for key, known in table.known.items() if known.shape is None]
                name_skipped({f"sample {key} in {name_of(table.address)}": "its header cannot be read" for key in broken})
                unreadable += len(broken)
                left_out.update(table.left_out)
                left_out.update(filter(None, map(unusable, table.groups.values())))
            _write_line(stream, {"shards": shards})
    finally:
        files.close()
    return {"shards": shards, "samples": samples, "unreadable": unreadable, "left_out": dict(sorted(left_out.items()))}


def read_index(address: str, files: OpenFiles) -> Iterator[ShardTable]:
    """The tables of an index file, one shard at a time. ValueError naming the line for a file that is damaged or hostile."""
    count = 0
    with stream(files.open(address)) as lines:
        for number in itertools.count(1):
            line = lines.readline(limits.INDEX_LINE_BYTES + 1)
            try:
                _check_length(line)
                value = _object(json.loads(line))
                if number == 1:
                    if value.get("format") != FORMAT or value.get("version") != VERSION:
                        raise ValueError(f"it is no index of version {VERSION}")
                elif "shards" in value:
                    if value["shards"] != count:
                        raise ValueError(f"{count} shards are listed, not {value['shards']}")
                    return
                else:
                    table = _from_json(value, address)
                    count += 1
                    yield table
            except (ValueError, RecursionError) as error:
                where = f"line {number}" if line else "its end is missing"
                raise ValueError(f"{shown(address)}, {where}: {error}; write it again with bitdance data index") from error


def _is_index(path: Path) -> bool:
    with open(path, "rb") as stream:
        return FORMAT.encode() in stream.readline(200)


def _write_line(stream: BinaryIO, value: Any) -> None:
    line = json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"
    try:
        _check_length(line)
    except ValueError as error:
        raise ValueError(f"the index of {shown(value['name'])} is too long: {error}; make smaller shards") from None
    stream.write(line)


def _check_length(line: bytes) -> None:
    if len(line) > limits.INDEX_LINE_BYTES:
        raise ValueError(f"a line of more than {size_text(limits.INDEX_LINE_BYTES)} (BITDANCE_LIMIT_INDEX_LINE_BYTES)")


def _to_json(table: ShardTable, folder: Path) -> dict[str, Any]:
    name = table.address
    if not is_url(name):
        path = Path(os.path.abspath(name))
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    samples = []
    for key, members in table.groups.items():
        known = (table.known or {}).get(key, Known(None, {}))
        samples.append([key, members, [known.shape.height, known.shape.width] if known.shape else None, known.attributes])
    return {"name": name, "size": table.size, "left_out": dict(table.left_out), "samples": samples}


def _from_json(value: dict[str, Any], index: str) -> ShardTable:
    name, size = value.get("name"), _whole(value.get("size"), 2**63)
    left_out = {reason: _whole(count, 2**63) for reason, count in _object(value.get("left_out")).items()}
    if not isinstance(name, str) or not name or not isinstance(value.get("samples"), list):
        raise ValueError("a shard needs a name and a list of samples")
    groups: dict[str, dict[str, Span]] = {}
    facts: dict[str, Known] = {}
    for sample in value["samples"]:
        if not isinstance(sample, list) or len(sample) != 4 or not isinstance(sample[0], str) or sample[0] in groups:
            raise ValueError(f"{str(sample)[:200]} is no sample, or a second one of the same key")
        key, members, sides, attributes = sample
        groups[key] = {ending: _place(ending, place, size) for ending, place in _object(members).items()}
        if not unusable(groups[key]):
            facts[key] = Known(_shape(sides, "bits" in members), _object(attributes))
    return ShardTable(beside(index, name), size, groups, Counter(left_out), facts)


def _place(ending: str, place: Any, length: int) -> Span:
    if ending not in MEMBER_LIMITS or not isinstance(place, list) or len(place) != 2:
        raise ValueError(f"{ending!r}: {str(place)[:200]} is no place of a member")
    offset, size = _whole(place[0], length), _whole(place[1], MEMBER_LIMITS[ending])
    if offset + size > length:
        raise ValueError(f"{ending!r}: {size} bytes from {offset} do not lie within the {length} bytes of the shard")
    return offset, size


def _shape(sides: Any, bits: bool) -> Shape | None:
    if sides is None:
        return None
    if not isinstance(sides, list) or len(sides) != 2 or not all(_whole(side, LONGEST_SIDE) for side in sides):
        raise ValueError(f"{str(sides)[:200]} is no height and width")
    return Shape(sides[0], sides[1], bits)


def _whole(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{str(value)[:200]} is no whole number from 0 to {limit}")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:200]} is no object")
    return value
