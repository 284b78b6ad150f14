"""The one way in which captions are read, whatever holds them: a .txt beside a picture or in a shard, a JSON member, a table.

Text is UTF-8, with or without a byte order mark. A .txt holds one caption a line; in JSON and in tables one text is one caption
and a list holds several. Blank text and null are no caption. What is no text is refused, with the place where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfq_tokenizer import limits
from lfq_tokenizer.files import size_text
from lfq_tokenizer.text import check_unicode, decoded, text_lines

NAMES = ("captions", "caption")  # of a JSON member; the first that holds a caption counts
UNCONDITIONAL = [""]  # the list that says: on purpose without words, as `bitdance tokenizer encode` writes it


class BrokenCaption(ValueError):
    """The captions of a sample cannot be used. `reason` is what is counted, the text says where and why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def captions_of_text(data: bytes, source: str) -> list[str]:
    """The captions of a text file, one a line, without the blank lines; none in a blank file. BrokenCaption names `source`."""
    if len(data) > limits.CAPTION_BYTES:
        raise too_long(source, len(data))
    try:
        text = decoded(data, source)
    except ValueError as error:
        raise BrokenCaption("captions are not UTF-8", str(error)) from None
    return [caption for line in text_lines(text) if (caption := _tidy(line, source))]


def captions_of_value(value: Any, source: str) -> list[str]:
    """The captions in a JSON value or a field of a table: a text is one, a list holds several, null and blank ones are none.

    The list `[""]` stays as it is: it asks for the unconditional prompt. BrokenCaption for everything else.
    """
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise BrokenCaption("caption unreadable", f"{source}: captions must be a text or a list of texts")
    return list(texts) if value == UNCONDITIONAL else [caption for text in texts if (caption := _tidy(text or "", source))]


def captions_of_record(record: Mapping[str, Any], source: str, names: Sequence[str] = NAMES) -> list[str]:
    """The captions under the first of `names` that holds any; none where no name does."""
    return next((found for name in names if (found := captions_of_value(record.get(name), source))), [])


def too_long(source: str, size: int) -> BrokenCaption:
    """The refusal of captions of so many bytes."""
    return BrokenCaption("captions too long", f"{source}: {size_text(size)}; at most {size_text(limits.CAPTION_BYTES)} are read")


def _tidy(text: str, source: str) -> str:
    """The text without the blanks around it and a byte order mark before it."""
    try:
        check_unicode(text, source)
    except ValueError as error:
        raise BrokenCaption("caption is no valid text", str(error)) from None
    if "\0" in text:
        where = f"{source}: a zero character at position {text.index(chr(0))}"
        raise BrokenCaption("caption is no valid text", f"{where}; if it is UTF-16, save it as UTF-8")
    return text.strip().removeprefix("\ufeff").strip()
