"""What a source of captioned pictures yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class CaptionedPicture:
    """One RGB picture with its captions.

    `key` names the sample inside a shard: letters, digits, `-` and `_` only (a dot would end the key). `attributes`
    holds what the captions are made of, e.g. concept, style, background, hexcode, split. When `encoded` is given, these
    bytes (of a file whose ending is `ending`) are stored as they are, and `picture` may be None; otherwise it is stored as PNG.
    """

    key: str
    picture: Image.Image | None
    captions: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    encoded: bytes | None = None
    ending: str = "png"
    targets: bytes | None = None  # a further member of that ending


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be used: `name` for the log, `reason` a short code that is counted, `why` in full, where known."""

    name: str
    reason: str
    why: str = field(default="", compare=False)


class PictureSource(Protocol):
    """A source: iterate once; `expected` is the number of items for the progress bar and the limit on bad ones."""

    expected: int

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]: ...

    def describe(self) -> dict[str, Any]:
        """Name, arguments and a hash of the content, for `pack.json`. Called after the iteration."""
        ...
