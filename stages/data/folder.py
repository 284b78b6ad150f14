"""A folder of pictures with captions: same-named .txt files, or a table (JSONL or CSV) that names the files.

bitdance data pack folder shards/mine my-pictures --size 64 --table captions.jsonl
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lfq_tokenizer import limits
from lfq_tokenizer.json_file import read_bytes
from stages.data.caption_table import Captioned, read_table
from stages.data.caption_text import BrokenCaption, captions_of_text, too_long
from stages.data.picture import ENDINGS, BrokenPicture, decode_picture
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.walk import ending_of, listing, read_inside, shown_name, within

FITS = ("crop", "pad", "none")


@dataclass(frozen=True)
class FolderOptions:
    """`fit`: crop the middle square, pad with white to a square, or keep size and file as they are (none). `classes`: a picture's
    class is what the table says in its column `class`, without a table the folder that it lies in; it needs no caption."""

    size: int = 64
    fit: str = "crop"
    min_side: int = 16
    table: str | None = None
    classes: bool = False

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"--fit {self.fit}: choose one of {', '.join(FITS)}")
        if not 8 <= self.size <= 4096 or self.min_side < 1:
            raise ValueError(f"--size {self.size} must be 8 to 4096 and --min-side {self.min_side} at least 1")


class FolderSource:
    """The captioned pictures of a folder as a `PictureSource`.

    Without a table every picture needs a .txt of the same name, one caption a line; with one, see `caption_table`. A table may
    only name files inside the folder. `notes` counts what was not looked at and what was done with the pictures.
    """

    def __init__(self, folder: str | os.PathLike[str], options: FolderOptions = FolderOptions()) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.options = options
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; name the folder that holds the pictures")
        found = listing(self.folder, [options.table] if options.table else [])
        self.notes, self._unread = found.passed, found.unread
        self._rows: dict[str, Captioned | str | None] = {**found.pictures}  # name → what the table says, or its .txt, or neither
        if options.table:
            self._rows = {**self._table(options.table)}
            self._unread = {}
            self.notes["pictures that the table does not name"] += sum(name not in self._rows for name in found.pictures)
        self.expected = len(self._rows) + len(self._unread)
        self._digest = hashlib.sha256()
        self._sizes: Counter[tuple[int, int]] = Counter()
        if not self.expected:
            raise ValueError(f"{folder} holds no PNG, JPEG or WebP file, nor GIF, BMP, TIFF or AVIF; name another folder")

    def _table(self, name: str) -> dict[str, Captioned]:
        try:
            path = within(self.folder, name)
        except BrokenPicture:
            path = None
        if path is None or not path.is_file():
            raise FileNotFoundError(f"--table {name}: no such file inside {self.folder}")
        if path.suffix.lower() not in (".jsonl", ".csv"):
            raise ValueError(f"--table {name}: expected a .jsonl or a .csv file")
        return read_table(path, name)

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        for name, known in self._rows.items():
            try:
                yield self._sample(name, known)
            except (BrokenPicture, BrokenCaption) as error:
                yield Skipped(shown_name(name), error.reason, str(error))
        for name, reason in self._unread.items():
            yield Skipped(shown_name(name), reason)

    def _sample(self, name: str, known: Captioned | str | None) -> CaptionedPicture:
        path = within(self.folder, name)
        if not isinstance(known, Captioned):
            known = Captioned(text_captions(self.folder, known) if known else [])
        if self.options.classes:
            known = _labelled(known, name, bool(self.options.table))
        if known.broken:
            raise known.broken
        if not known.captions:
            raise BrokenCaption("no caption", shown_name(name))
        if path.exists() and ending_of(name) not in ENDINGS:
            raise BrokenPicture("format", shown_name(name))
        data = read_inside(self.folder, name)
        self._digest.update(json.dumps([shown_name(name), known.captions]).encode() + hashlib.sha256(data).digest())
        picture = decode_picture(data, notes=self.notes)
        if min(picture.size) < self.options.min_side:
            raise BrokenPicture("too small", shown_name(name))
        self._sizes[picture.size] += 1
        key, attributes = shard_key(name), {"file": shown_name(name), **known.attributes}
        if self.options.fit == "none":
            return CaptionedPicture(key, picture, known.captions, attributes, data, ENDINGS[ending_of(name)])
        return CaptionedPicture(key, fit(picture, self.options.size, self.options.fit), known.captions, attributes)

    def describe(self) -> dict[str, Any]:
        return {"name": "folder", "sha256": self._digest.hexdigest(), "arguments": asdict(self.options)}

    def sizes(self) -> str:
        """What was done with the sizes of the pictures, and what changes it, for people."""
        if not self._sizes:
            return ""
        largest, smallest = (pick(self._sizes, key=lambda size: size[0] * size[1]) for pick in (max, min))
        told = f"pictures of {smallest[0]}×{smallest[1]}"
        told += f" to {largest[0]}×{largest[1]} pixels" if largest != smallest else " pixels"
        if self.options.fit == "none":
            return f"{told} are kept as they are (--fit none)"
        size = self.options.size
        oblong = sum(n for (width, height), n in self._sizes.items() if width != height)
        side = min if self.options.fit == "crop" else max
        enlarged = sum(n for both, n in self._sizes.items() if side(both) < size)
        how = "cropped to the middle square" if self.options.fit == "crop" else "padded with white to a square"
        return (
            f"{told} became {size}×{size}: {oblong} {how}, {enlarged} enlarged; "
            "--size N changes the side, --fit pad|none how it is reached"
        )


def _labelled(known: Captioned, name: str, by_table: bool) -> Captioned:
    """The same with the class as an attribute and, where there is no caption, as the caption. BrokenCaption without a class."""
    label = known.attributes.get("class") if by_table else name.rpartition("/")[0].partition("/")[0]
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        where = "the table has no class for it" if by_table else "it lies in no folder that names its class"
        raise BrokenCaption("no class", f"{shown_name(name)}: {where}")
    captions = known.captions or [str(label)]
    return Captioned(captions, {**known.attributes, "class": label})


def text_captions(folder: Path, name: str) -> list[str]:
    """The captions in a .txt file of a folder. BrokenCaption or BrokenPicture name it."""
    path = within(folder, name)
    try:
        if path.is_file() and path.stat().st_size > limits.CAPTION_BYTES:
            raise too_long(shown_name(name), path.stat().st_size)
        data = read_bytes(path, limits.CAPTION_BYTES)
    except OSError as error:
        raise BrokenCaption("caption cannot be read", f"{shown_name(name)}: {error.strerror}") from error
    except BrokenCaption:
        raise
    except ValueError as error:
        raise BrokenCaption("caption cannot be read", str(error)) from None
    return captions_of_text(data, shown_name(name))


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
    return f"{readable}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
