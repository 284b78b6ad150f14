"""What is known of a sample without decoding it: its shape, captions and attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lfq_tokenizer import limits
from lfq_tokenizer.json_file import parse_json
from stages.data.bits import HEADER_BYTES, bits_shape
from stages.data.caption_text import UNCONDITIONAL, BrokenCaption, captions_of_record, captions_of_text
from stages.data.picture import ENDINGS, BrokenPicture, upright_size

PICTURE_ENDINGS = tuple(dict.fromkeys(("png", "jpg", "jpeg", "webp", *ENDINGS)))
TEXT_ENDINGS = ("json", "txt")
MEMBER_LIMITS = dict.fromkeys((*PICTURE_ENDINGS, "bits", "targets"), limits.PICTURE_BYTES)
MEMBER_LIMITS |= dict.fromkeys(TEXT_ENDINGS, limits.CAPTION_BYTES)
_PICTURE_HEAD = 2**16
LONGEST_SIDE = 2**20

Span = tuple[int, int]
Read = Callable[[int, int], bytes]  # (offset, size) → bytes


@dataclass(frozen=True)
class Shape:
    """Height and width in pixels or, of a sample with bits, in tokens."""

    height: int
    width: int
    bits: bool = False


def picture_ending(members: Mapping[str, Span]) -> str | None:
    """The ending of the member that is the sample's picture."""
    return next((ending for ending in PICTURE_ENDINGS if ending in members), None)


def read_text(members: Mapping[str, Span], read: Read) -> tuple[list[str], dict[str, Any]]:
    """Captions and attributes of a sample: its .json member says both, and where that has no caption the .txt member does.

    BrokenCaption where neither has one.
    """
    captions, attributes = read_json(members, read)
    if captions in ([], UNCONDITIONAL) and "txt" in members:
        captions = captions_of_text(read(*members["txt"]), "the .txt member") or captions
    if not captions:
        expected = 'expected {"captions": ["…"]}, {"caption": "…"} or a .txt member with text'
        raise BrokenCaption("no caption", expected)
    return captions, attributes


def read_json(members: Mapping[str, Span], read: Read) -> tuple[list[str], dict[str, Any]]:
    """Captions and attributes of the .json member: its object `attributes` or, where there is none, all its other fields."""
    if "json" not in members:
        return [], {}
    try:
        content = parse_json(read(*members["json"]), "the .json member", nan=True)
    except ValueError as error:
        raise BrokenCaption("caption unreadable", str(error)) from None
    if not isinstance(content, dict):
        raise BrokenCaption("caption unreadable", f"the .json member holds a {type(content).__name__}, not an object")
    captions = captions_of_record(content, "the .json member")
    others = {name: value for name, value in content.items() if name not in ("captions", "caption")}
    attributes = content.get("attributes", others)
    if attributes is not None and not isinstance(attributes, dict):
        raise BrokenCaption("caption unreadable", "the .json member needs attributes as an object")
    return captions, attributes or {}


def read_shape(members: Mapping[str, Span], read: Read) -> Shape:
    """Of bits or a picture, from the header; that of a picture upright. What attributes say of its size is not believed.

    ValueError (`BrokenPicture` is one) where the header cannot be read.
    """
    if "bits" in members:
        offset, size = members["bits"]
        _, height, width = bits_shape(read(offset, min(size, HEADER_BYTES)))
        return Shape(height, width, bits=True)
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
    if max(height, width) > LONGEST_SIDE:
        raise BrokenPicture("too large", f"{width}×{height} pixels; sides of at most {LONGEST_SIDE} are used")
    return Shape(height, width)
