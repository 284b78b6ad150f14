"""Tables of captions, CSV or JSONL: read row by row, each row bounded, and every mistake named with its place."""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lfq_tokenizer import limits
from lfq_tokenizer.files import size_text
from lfq_tokenizer.json_file import parse_json
from lfq_tokenizer.text import listed, printable
from stages.data.caption_text import BrokenCaption, captions_of_record

NAMES = ("captions", "caption", "prompt")  # columns that may hold captions
_NO_TEXT = re.compile("[\udc80-\udcff]")  # what Python makes of bytes that are no UTF-8, where it is told to go on
SIZES = {"width": "original_width", "height": "original_height"}  # what a pack is cut to is another size


@dataclass
class Captioned:
    """What a table says of one picture. `broken`: why its captions cannot be used, or None."""

    captions: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    broken: BrokenCaption | None = None


def read_table(path: Path, name: str) -> dict[str, Captioned]:
    """File name → captions and attributes, in the order of the table; several rows of one file are joined.

    The table has the columns `file` and `caption` or `captions` (in JSONL also a list) or `prompt`; further columns, as
    `class`, become attributes, `width` and `height` under the names `original_width` and `original_height`. ValueError names
    table and row.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        lines = _lines(stream, path, name)
        rows = _csv_rows(lines, name) if path.suffix.lower() == ".csv" else _json_rows(lines, name)
        found: dict[str, Captioned] = {}
        for where, record in rows:
            file = record.get("file")
            if not isinstance(file, str) or not file:
                raise ValueError(f"{where}: no column `file`; found {printable(listed(list(map(str, record)), ', '))}")
            _join(found.setdefault(_normal(file), Captioned()), record, where)
        return found


def _join(known: Captioned, record: dict[str, Any], where: str) -> None:
    try:
        captions = captions_of_record(record, where, NAMES)
    except BrokenCaption as error:
        if error.reason == "caption unreadable":  # a number, an object: the table is another one
            raise ValueError(str(error).partition(": ")[2]) from None
        known.broken = error
        captions = []
    known.captions = list(dict.fromkeys((*known.captions, *captions)))
    for column, value in record.items():
        if column not in ("file", "caption", "captions"):
            name = SIZES.get(column, column)
            before = known.attributes.setdefault(name, value)
            if before != value:
                known.attributes[name] = [*(before if isinstance(before, list) else [before]), value]


def _normal(file: str) -> str:
    return file if file.startswith("/") else posixpath.normpath(file)


Line = tuple[int, str]  # number from 1, text with its end


def _lines(stream: TextIO, path: Path, name: str) -> Iterator[Line]:
    """The lines of a text, which end with LF, CR LF or CR. ValueError for a line beyond the limit or without meaning in UTF-8."""
    number = 0
    with path.open("rb") as start:
        if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{name}: UTF-16 text; save it as UTF-8")
    while line := stream.readline(limits.TABLE_ROW_BYTES + 1):
        number += 1
        if len(line) > limits.TABLE_ROW_BYTES:
            raise _too_long(f"{name}, line {number}")
        if found := _NO_TEXT.search(line):
            before = _bytes_before(path, number) + len(line[: found.start()].encode())
            at = f"byte 0x{ord(found.group()) - 0xDC00:02x} at position {before}"
            raise ValueError(f"{name}, line {number}: not UTF-8 ({at}); save it as UTF-8")
        yield number, line


def _bytes_before(path: Path, number: int) -> int:
    """How many bytes stand before the text of a line of a file."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        before = sum(len(stream.readline().encode()) for _ in range(number - 1))
        return before or 3 * stream.read(1).startswith("\ufeff")


def _too_long(where: str) -> ValueError:
    return ValueError(
        f"{where}: a row of more than {size_text(limits.TABLE_ROW_BYTES)} (BITDANCE_LIMIT_TABLE_ROW_BYTES); is a quote left open?"
    )


def _json_rows(lines: Iterator[Line], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    row = 0
    for number, line in lines:
        if not line.strip():
            continue
        row += 1
        record = parse_json(line, f"{name}, line {number}", nan=True)
        if not isinstance(record, dict):
            raise ValueError(f"{name}, line {number}: expected an object with file and caption")
        yield f"{name}, row {row}", record


class _Record:
    """Feeds `csv` with lines and knows where a record began and how long it is."""

    def __init__(self, lines: Iterator[Line], name: str) -> None:
        self._lines, self._name, self.first, self._length = lines, name, 1, 0

    def begin(self) -> None:
        self.first, self._length = 0, 0

    def __iter__(self) -> _Record:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.first = self.first or number
        self._length += len(line)
        if self._length > limits.TABLE_ROW_BYTES:
            raise _too_long(f"{self._name}, line {self.first}")
        return line


def _csv_rows(lines: Iterator[Line], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    source = _Record(lines, name)
    reader = csv.reader(source, strict=True)
    columns: list[str] = []
    row = 0
    while True:
        source.begin()
        where = f"{name}, row {row}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            at = f"{where} (line {source.first})" if columns else f"{name}, line {source.first}"
            raise ValueError(f"{at}: no readable CSV ({error}); is a quote left open?") from error
        if fields is None:
            return
        if not any(fields):
            continue
        if not columns:
            columns, row = [field.strip() for field in fields], 1
            if twice := [column for column in columns if column and columns.count(column) > 1]:
                raise ValueError(f"{name}: column {printable(twice[0])!r} is there twice; name each column once")
            continue
        if len(fields) > len(columns):
            found = f"{len(fields)} fields where the header has {len(columns)}"
            raise ValueError(f"{where} (line {source.first}): {found}; put texts with commas in double quotes")
        yield where, dict(zip(columns, fields, strict=False))
        row += 1
