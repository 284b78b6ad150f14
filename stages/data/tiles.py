"""Square tiles of large photographs, for training and judging a tokenizer where only a few dozen photographs are at hand.

bitdance data pack tiles shards/photos my-photographs --size 64 --tiles 100 --hold-out 0.2
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stages.data.folder import shard_key
from stages.data.picture import BrokenPicture, decode_picture
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.walk import listing, read_inside, shown_name


@dataclass(frozen=True)
class TileOptions:
    """`tiles` per photograph, each `size`² pixels after shrinking by a random factor between 1 and `shrink`.

    `hold_out`: the fraction of photographs (never of tiles) that the split "heldout" holds and "train" lacks.
    """

    size: int = 64
    tiles: int = 100
    shrink: float = 16.0
    hold_out: float = 0.0
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096 or self.tiles < 1 or self.shrink < 1:
            raise ValueError(f"--size {self.size} must be 8 to 4096, --tiles {self.tiles} and --shrink {self.shrink} at least 1")
        if not 0 <= self.hold_out <= 0.5:
            raise ValueError(f"--hold-out {self.hold_out}: give a fraction from 0 to 0.5")
        if self.split not in ("train", "heldout"):
            raise ValueError(f"--split {self.split}: choose train or heldout")


class TileSource:
    """The tiles of one split as a `PictureSource`. Photographs are told apart by name; a tile's caption is that name."""

    def __init__(self, folder: str | os.PathLike[str], options: TileOptions = TileOptions()) -> None:
        self.options = options
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; name the folder that holds the photographs")
        files = listing(self.folder)
        self.notes, self._unread = files.passed, files.unread
        found = list(files.pictures)
        order = list(found)
        random.Random(options.seed).shuffle(order)
        apart = set(order[: round(options.hold_out * len(order))])
        self.photographs = [name for name in found if (name in apart) == (options.split == "heldout")]
        if not self.photographs:
            raise ValueError(f"{folder}: the {options.split} split is empty; {len(found)} pictures were found in all")
        self.expected = len(self.photographs) * options.tiles
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        for file in self.photographs:
            name = shown_name(file)
            try:
                data = read_inside(self.folder, file)
                picture = decode_picture(data, notes=self.notes)
                if min(picture.size) < self.options.size:
                    raise BrokenPicture("too small", name)
            except BrokenPicture as error:
                yield Skipped(name, error.reason, str(error))
                continue
            self._digest.update(name.encode() + hashlib.sha256(data).digest())
            draw = random.Random(f"{self.options.seed} {name}")
            for number in range(self.options.tiles):
                key, caption = f"{shard_key(file)}-{number:04d}", Path(name).stem
                yield CaptionedPicture(key, self._tile(picture, draw), [caption], {"file": name})
        for file, reason in self._unread.items():
            yield Skipped(shown_name(file), reason)

    def _tile(self, picture: Image.Image, draw: random.Random) -> Image.Image:
        largest = min(self.options.shrink, min(picture.size) / self.options.size)
        side = round(self.options.size * largest ** draw.random())  # uniform in the logarithm
        left, top = (draw.randint(0, length - side) for length in picture.size)
        tile = picture.crop((left, top, left + side, top + side))
        return tile.resize((self.options.size, self.options.size), Image.Resampling.LANCZOS)

    def describe(self) -> dict[str, Any]:
        return {"name": "tiles", "sha256": self._digest.hexdigest(), "arguments": asdict(self.options)}
