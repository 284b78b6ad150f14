"""Prompts as people give them: words of a command line, or a file that is read line by line and never held whole."""

import json
import re
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bitdance.jobs.job import Request, checked_prompt, cut
from bitdance.values import check_number, shown
from lfq_tokenizer import limits
from lfq_tokenizer.files import size_text
from lfq_tokenizer.json_file import parse_json
from lfq_tokenizer.text import check_unicode, decoded, did_you_mean

NUMBERS = ("seed", "height", "width", "guidance", "steps", "n")
KEYS = ("prompt", "id", "class", *NUMBERS)
TEXT_ENDINGS, JSONL_ENDINGS = ("", ".txt", ".text"), (".jsonl", ".ndjson")
MAX_NAME_BYTES = 120
_KEYS, _NUMBERS = frozenset(KEYS), frozenset(NUMBERS)
_COLUMNS = {*KEYS, "caption", "captions", "text", "file", "file_name", "image", "class", "negative_prompt"}
_NOT_IN_NAMES = re.compile(r'[\x00-\x20\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff/\\:*?"<>|]+')
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,118}[A-Za-z0-9_-])?")
_LINE_END = re.compile(b"\r\n|\r|\n")
_CHUNK = 1 << 20


class PromptFile:
    """The requests of a file: one JSON object per line (`.jsonl`, `.ndjson`), or one prompt per line with blank ones
    skipped.

    Each iteration reads the file anew, so a million lines take no memory. `name` "-" is standard input, which like any pipe
    is JSONL when its first line starts with "{"; what cannot be read twice is copied to a temporary file first. Iterating raises
    ValueError, which names the line, for what is no such line, and for lines that are JSON or a table where prompts were
    expected.
    """

    def __init__(self, name: str, stream: BinaryIO) -> None:
        """`stream` can be read again from its start."""
        self.label = "standard input" if name == "-" else name
        self._stream = stream
        piped = name == "-" or (not Path(name).is_file() and Path(name).exists())  # has no ending that says anything
        ending = "" if piped else Path(name).suffix.lower()
        if ending not in (*TEXT_ENDINGS, *JSONL_ENDINGS):
            raise ValueError(
                f"{self.label}: {ending} files are not read; give one prompt per line (.txt) or one JSON object per line (.jsonl)"
            )
        self._jsonl = ending in JSONL_ENDINGS or (piped and next(self._lines(), (0, ""))[1].lstrip().startswith("{"))

    @classmethod
    def open(cls, name: str, standard_input: BinaryIO | None) -> "PromptFile":
        """The file of that name, or "-". ValueError when there is no such file."""
        if name == "-":
            if standard_input is None:
                raise ValueError("--prompts -: standard input is closed; give a file")
            return cls(name, _copied(standard_input, "standard input"))
        if "\0" in name:
            raise ValueError(f"--prompts {shown(name)}: no file has a NUL in its name; give a .txt or .jsonl file")
        try:
            file = open(name, "rb")  # noqa: SIM115 (lives as long as the requests do)
            if stat.S_ISREG(Path(name).stat().st_mode):
                return cls(name, file)
            return cls(name, _copied(file, name))  # a pipe, as <(command) makes it
        except OSError as error:
            raise ValueError(f"--prompts {name}: {error.strerror}; give a .txt or .jsonl file, or - for standard input") from None

    def __iter__(self) -> Iterator[Request]:
        number = 0
        for number, line in self._lines():
            yield self._request(line, f"{self.label} line {number}")
        if not number:
            raise ValueError(f"{self.label} holds no prompt; write one per line")

    def _request(self, line: str, source: str) -> Request:
        if self._jsonl:
            return _from_json(line, source)
        line = line.strip()
        if line[0] in "[{" and _is_json(line):
            raise ValueError(f"{source} is JSON, not a prompt; name the file with .jsonl and write one object per line")
        if "," in line and {word.strip(' "').lower() for word in line.split(",")} <= _COLUMNS:
            raise ValueError(f"{source} is the head of a table, which is not read; write one prompt per line, or JSONL")
        return Request(checked_prompt(line, source), source)

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(number from 1, text) of the lines that are not blank."""
        position = 0
        for number, (line, length) in enumerate(_split(self._stream, self.label), 1):
            if line.strip():
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        decoded(line, self.label)
                    at = f"not UTF-8 at byte {position + error.start} of the file"
                    raise ValueError(f"{self.label} line {number}: {at}; save it as UTF-8") from None
                if text.strip():  # other blanks than ASCII's, or a byte order mark alone
                    yield number, text
            position += length


def _copied(stream: BinaryIO, label: str) -> BinaryIO:
    copy, room = tempfile.TemporaryFile(), limits.PROMPT_FILE_BYTES  # noqa: SIM115 (lives as long as the requests do)
    while chunk := stream.read(_CHUNK):
        if (room := room - len(chunk)) < 0:
            raise ValueError(f"{label} is longer than {size_text(limits.PROMPT_FILE_BYTES)}; part the prompts")
        copy.write(chunk)
    return copy


def _split(stream: BinaryIO, label: str) -> Iterator[tuple[bytes, int]]:
    """(line without its end, bytes with it) of a stream from its start. ValueError for a line beyond the limit."""
    stream.seek(0)
    rest, number = b"", 0
    while chunk := stream.read(_CHUNK):
        if chunk.endswith(b"\r"):
            chunk += stream.read(1)  # CR LF is one end
        rest += chunk
        start = 0
        for end in _LINE_END.finditer(rest):
            number += 1
            if end.start() - start > limits.PROMPT_LINE_BYTES:
                raise _too_long(label, number)
            yield rest[start : end.start()], end.end() - start
            start = end.end()
        rest = rest[start:]
        if len(rest) > limits.PROMPT_LINE_BYTES:
            raise _too_long(label, number + 1)
    if rest:
        yield rest, len(rest)


def _too_long(label: str, number: int) -> ValueError:
    return ValueError(f"{label} line {number} is longer than {size_text(limits.PROMPT_LINE_BYTES)}; one prompt a line is read")


def _is_json(line: str) -> bool:
    try:
        return isinstance(parse_json(line, ""), dict | list)
    except ValueError:
        return False


def _from_json(line: str, source: str) -> Request:
    value = parse_json(line, source, checked_later=True)  # check_number refuses it in the words of every other door
    if not isinstance(value, dict):
        raise ValueError(f'{source}: holds {type(value).__name__}, not an object; write {{"prompt": "…"}}')
    if not value.keys() <= _KEYS:
        key = next(key for key in value if key not in _KEYS)
        raise ValueError(f"{source}: unknown key {shown(key)}; {did_you_mean(key, KEYS)}known keys: {', '.join(KEYS)}")
    if ("prompt" in value) == ("class" in value):
        told = 'has both "prompt" and "class"; one of them is allowed' if "prompt" in value else 'has no "prompt"'
        raise ValueError(f'{source}: {told}; only this key is required (of a class model "class")')
    for name in value.keys() & _NUMBERS:
        value[name] = check_number(name, value[name], source)
    if "id" in value:
        value["id"] = safe_name(value["id"], source)
    if "class" in value:
        value["label"] = value.pop("class")
        if value["label"] is None:
            raise ValueError(f"{source}: class = None; a number or a name is allowed")
    value["prompt"] = checked_prompt(value.get("prompt", ""), source)
    return Request(source=source, **value)


def safe_name(name: Any, source: str) -> str:
    """An id as a file name stem: no separators, spaces, control or invisible characters, no leading dot, at most 120 bytes."""
    if not isinstance(name, str):
        raise ValueError(f"{source}: id is {json.dumps(name)[:60]}; it must be a string")
    if _PLAIN_NAME.fullmatch(name):
        return name
    check_unicode(name, f"{source}: id")
    name = unicodedata.normalize("NFC", name[: 4 * MAX_NAME_BYTES])
    stem = cut(_NOT_IN_NAMES.sub("-", name).lstrip(".-").rstrip("."), MAX_NAME_BYTES)
    if not stem:
        raise ValueError(f"{source}: id {shown(name)} leaves nothing for a file name; use letters or digits")
    return stem
