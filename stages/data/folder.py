"""A folder of pictures with captions: same-named .txt files, or a table (JSONL or CSV) that names the files.

bitdance data pack folder shards/mine my-pictures --size 64 --table captions.jsonl
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stages.data.metadata import MEMBER_LIMITS
from stages.data.picture import BrokenPicture, decode_picture
from stages.data.sample import CaptionedPicture, Skipped

ENDINGS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
FITS = ("crop", "pad", "none")


@dataclass(frozen=True)
class FolderOptions:
    """`fit`: crop the middle square, pad with white to a square, or keep size and file as they are (none)."""

    size: int = 64
    fit: str = "crop"
    min_side: int = 16
    table: str | None = None

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"--fit {self.fit}: choose one of {', '.join(FITS)}")
        if not 8 <= self.size <= 4096 or self.min_side < 1:
            raise ValueError(f"--size {self.size} must be 8 to 4096 and --min-side {self.min_side} at least 1")


class FolderSource:
    """The captioned pictures of a folder as a `PictureSource`.

    Without a table every picture needs a .txt of the same name, one caption a line. A table has the columns `file` and
    `caption` or `captions` (in JSONL a list, in CSV one text), or `prompt`, as manifest.jsonl of `bitdance generate` has; further
    columns become attributes. A table may only name files inside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], options: FolderOptions = FolderOptions()) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.options = options
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; name the folder that holds the pictures")
        self._rows = self._from_table(options.table) if options.table else self._from_text_files()
        self.expected = len(self._rows)
        self._digest = hashlib.sha256()
        if not self._rows:
            raise ValueError(f"{folder} holds no PNG, JPEG or WebP file")

    def _from_text_files(self) -> list[tuple[str, list[str] | None, dict[str, Any]]]:
        rows: list[tuple[str, list[str] | None, dict[str, Any]]] = []
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in ENDINGS and path.is_file():
                name = path.relative_to(self.folder)
                text = self._inside(name.with_suffix(".txt").as_posix())
                captions = _lines(text) if text is not None and text.is_file() else None
                rows.append((name.as_posix(), captions, {}))
        return rows

    def _from_table(self, name: str) -> list[tuple[str, list[str] | None, dict[str, Any]]]:
        path = self._inside(name)
        if path is None or not path.is_file():
            raise FileNotFoundError(f"--table {name}: no such file inside {self.folder}")
        if path.suffix.lower() not in (".jsonl", ".csv"):
            raise ValueError(f"--table {name}: expected a .jsonl or a .csv file")
        rows = []
        with open(path, encoding="utf-8-sig", newline="") as stream:
            records = csv.DictReader(stream) if path.suffix.lower() == ".csv" else _json_lines(stream, name)
            try:
                for number, record in enumerate(records, start=1):
                    rows.append(_row(record, name, number))
            except csv.Error as error:
                raise ValueError(f"{name}: no readable CSV ({error})") from error
        return rows

    def _inside(self, name: str) -> Path | None:
        """The file of that name, if it lies inside the folder, links followed."""
        try:
            path = (self.folder / name).resolve()
        except (OSError, ValueError):
            return None
        return path if path.is_relative_to(self.folder) else None

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        for name, captions, attributes in self._rows:
            try:
                yield self._sample(name, captions, attributes)
            except BrokenPicture as error:
                yield Skipped(name, error.reason)

    def _sample(self, name: str, captions: list[str] | None, attributes: dict[str, Any]) -> CaptionedPicture:
        path = self._inside(name)
        if path is None:
            raise BrokenPicture("outside the folder", name)
        if not captions:
            raise BrokenPicture("no caption", name)
        if not path.is_file() or path.suffix.lower() not in ENDINGS:
            raise BrokenPicture("missing" if not path.is_file() else "format", name)
        if path.stat().st_size > MEMBER_LIMITS["png"]:
            raise BrokenPicture("too large", name)
        data = path.read_bytes()
        self._digest.update(json.dumps([name, captions]).encode() + hashlib.sha256(data).digest())
        picture = decode_picture(data)
        if min(picture.size) < self.options.min_side:
            raise BrokenPicture("too small", name)
        key = shard_key(name)
        if self.options.fit == "none":
            return CaptionedPicture(
                key, picture, captions, {"file": name, **attributes}, data, ENDINGS[path.suffix.lower()]
            )
        return CaptionedPicture(
            key, fit(picture, self.options.size, self.options.fit), captions, {"file": name, **attributes}
        )

    def describe(self) -> dict[str, Any]:
        return {"name": "folder", "sha256": self._digest.hexdigest(), "arguments": asdict(self.options)}


def fit(picture: Image.Image, size: int, how: str) -> Image.Image:
    """RGB → RGB (size, size): "crop" cuts the middle square, "pad" adds white at both sides of the shorter one."""
    width, height = picture.size
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # resize(box=…) would blend in what lies outside of the box
        square = picture.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.LANCZOS)
    scale = size / max(width, height)
    small = picture.resize((max(1, round(scale * width)), max(1, round(scale * height))), Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (size, size), (255, 255, 255))
    ground.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return ground


def shard_key(name: str) -> str:
    """A shard key: readable, and distinct for distinct files."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).with_suffix("").as_posix())[-60:]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _lines(path: Path) -> list[str]:
    if path.stat().st_size > MEMBER_LIMITS["txt"]:
        raise ValueError(
            f"{path.name} is longer than {MEMBER_LIMITS['txt']} bytes; a caption file holds one caption a line"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _json_lines(stream: Any, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: no JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{name}, line {number}: expected an object with file and caption")
        yield record


def _row(record: dict[str, Any], name: str, number: int) -> tuple[str, list[str] | None, dict[str, Any]]:
    file = record.get("file")
    captions = record.get("captions", record.get("caption", record.get("prompt")))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(file, str) or not file:
        raise ValueError(f"{name}, row {number}: no column `file`; found {', '.join(map(str, record))}")
    if captions is not None and not (isinstance(captions, list) and all(isinstance(text, str) for text in captions)):
        raise ValueError(f"{name}, row {number}: captions must be text, or a list of texts")
    attributes = {
        str(column): value for column, value in record.items() if column not in ("file", "caption", "captions", None)
    }
    return file, [text.strip() for text in captions or [] if text.strip()], attributes
