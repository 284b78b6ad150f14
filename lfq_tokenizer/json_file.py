"""JSON that anyone may have written: bounded, strict, with errors that name its source."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lfq_tokenizer import limits
from lfq_tokenizer.files import size_text, write_text
from lfq_tokenizer.text import escaped_json, printable, whole_number

Config = TypeVar("Config")


def parse_json(text: str | bytes, source: object, nan: bool = False, checked_later: bool = False) -> Any:
    """The JSON value of a text that anyone may have written. ValueError names `source` for what is no JSON, a key given
    twice, and for nesting or size beyond reason; also for NaN, infinities (which JSON lacks) and numbers of thousands of
    digits. `nan` takes NaN and infinities; `checked_later` takes all numbers, as whoever asks checks each of them."""
    if len(text) > limits.JSON_BYTES:
        raise ValueError(f"{source}: {size_text(len(text))} of JSON; at most {size_text(limits.JSON_BYTES)} are read")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return (_CHECKED_LATER if checked_later else _WITH_NAN if nan else _STRICT).decode(text)
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON ({error.msg} at character {error.pos})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not valid JSON (no UTF-8 at byte {error.start})") from None
    except ValueError as error:  # our own, or a number of more digits than Python converts
        reason = "a number of too many digits" if "digits" in str(error) else str(error)
        raise ValueError(f"{source}: {reason}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {printable(twice)[:100]!r} is given twice; keep one")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write a number")


_STRICT = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
_WITH_NAN = json.JSONDecoder(object_pairs_hook=_no_duplicates)
_CHECKED_LATER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_int=whole_number)


def json_text(value: Any) -> str:
    """Indented JSON to print: what could steer a terminal is written as \\uXXXX, all other letters as they are."""
    return escaped_json(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def read_bytes(path: Path | str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. A FIFO or device is refused and never waited for."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is no regular file; give a file")
        if found.st_size > limit:
            raise ValueError(f"{path} has {size_text(found.st_size)}; at most {size_text(limit)} are read")
        return file.read(limit + 1)[:limit]


def read_json(path: Path | str) -> Any:
    """The JSON value of a file. FileNotFoundError or ValueError name the file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; a model folder in the published layout holds it")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; download or export it again")
    try:
        return parse_json(read_bytes(path, limits.JSON_BYTES), path)
    except ValueError as error:
        raise ValueError(f"{error}; download or export it again") from None


def read_config(path: Path, parse: Callable[[Any], Config]) -> Config:
    """A JSON file of a model folder, parsed. What is wrong with it is a ValueError that names the file."""
    data = read_json(path)
    try:
        return parse(data)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_json(value: Any, path: Path | str) -> None:
    """Write JSON atomically: the file is either the old one or the whole new one."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)
