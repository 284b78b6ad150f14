"""What is known of a sample without decoding it: its shape, captions and attributes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.data.bits import HEADER_BYTES, bits_shape
from stages.data.picture import BrokenPicture, upright_size

PICTURE_ENDINGS = ("png", "jpg", "jpeg", "webp")
TEXT_ENDINGS = ("json", "txt")
MEMBER_LIMITS = dict.fromkeys((*PICTURE_ENDINGS, "bits", "targets"), 64 * 2**20) | dict.fromkeys(TEXT_ENDINGS, 2**20)
_PICTURE_HEAD = 2**16
LONGEST_SIDE = 2**20

Place = tuple[int, int]
Read = Callable[[int, int], bytes]  # (offset, size) → bytes


class BrokenCaption(ValueError):
    """The captions or attributes of a sample cannot be read."""


@dataclass(frozen=True)
class Shape:
    """Height and width in pixels or, of a sample with bits, in tokens."""

    height: int
    width: int
    bits: bool = False


def picture_ending(members: Mapping[str, Place]) -> str | None:
    """The ending of the member that is the sample's picture."""
    return next((ending for ending in PICTURE_ENDINGS if ending in members), None)


def read_text(members: Mapping[str, Place], read: Read) -> tuple[list[str], dict[str, Any]]:
    """Captions and attributes of a sample. BrokenCaption where there is no caption."""
    captions, attributes = read_json(members, read)
    try:
        if not captions and "txt" in members:
            captions = [read(*members["txt"]).decode("utf-8").strip()]
    except UnicodeDecodeError as error:
        raise BrokenCaption(f"the .txt member is no UTF-8 text ({error})") from error
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise BrokenCaption('captions are missing or not text; expected {"captions": ["…"]}, {"caption": "…"} or a .txt member')
    return captions, attributes


def read_json(members: Mapping[str, Place], read: Read) -> tuple[list[Any], dict[str, Any]]:
    """Captions and attributes of the .json member: its object `attributes` or, where there is none, all its other fields."""
    if "json" not in members:
        return [], {}
    try:
        content = json.loads(read(*members["json"]))
    except RecursionError as error:
        raise BrokenCaption("the .json member is nested too deeply") from error
    except ValueError as error:
        raise BrokenCaption(f"the .json member is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise BrokenCaption(f"the .json member holds a {type(content).__name__}, not an object")
    captions = content.pop("captions", content.pop("caption", []))
    attributes = content.get("attributes", content)
    if not isinstance(captions, (list, str)) or not isinstance(attributes, dict):
        raise BrokenCaption("the .json member needs captions as a list and attributes as an object")
    return [captions] if isinstance(captions, str) else captions, attributes


def read_shape(members: Mapping[str, Place], attributes: Mapping[str, Any], read: Read) -> Shape:
    """Of bits from their header; of a picture from the attributes `width` and `height`, or else from its header, upright.

    ValueError (`BrokenPicture` is one) where the header cannot be read.
    """
    if "bits" in members:
        offset, size = members["bits"]
        _, height, width = bits_shape(read(offset, min(size, HEADER_BYTES)))
        return Shape(height, width, bits=True)
    height, width = _side(attributes.get("height")), _side(attributes.get("width"))
    if height and width:
        return Shape(height, width)
    ending = picture_ending(members)
    assert ending is not None, "a sample has a picture or bits"
    offset, size = members[ending]
    try:
        width, height = upright_size(read(offset, min(size, _PICTURE_HEAD)))
    except BrokenPicture:
        if size <= _PICTURE_HEAD:
            raise
        # long comments stand before the size, or the format wants the whole file
        width, height = upright_size(read(offset, size))
    return Shape(height, width)


def _side(value: Any) -> int:
    return value if type(value) is int and 1 <= value <= LONGEST_SIDE else 0
