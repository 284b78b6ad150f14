"""Text of strangers: bytes → lines → what may be shown on a terminal."""

import re
from collections.abc import Sequence

_DIGITS = 4000
SHOWN = 10  # offenders listed in an error
# C0 and C1 controls, what turns the direction of writing, line and paragraph separators, invisible marks, lone surrogates
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]")
_LINE_END = re.compile("\r\n|\r|\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: object, lines: bool = False) -> str:
    """The text with control characters written out (ESC is shown as \\x1b), so that it cannot steer a terminal. `lines`
    keeps line ends and tabs."""

    def escaped(found: re.Match[str]) -> str:
        character = found.group()
        if lines and character in "\n\t":
            return character
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNSHOWABLE.sub(escaped, str(text))


def escaped_json(text: str) -> str:
    """The text of a JSON value with what could steer a terminal written as \\uXXXX, which means the same in JSON."""
    return _UNSHOWABLE.sub(lambda found: found.group() if found.group() == "\n" else f"\\u{ord(found.group()):04x}", text)


def whole_number(text: str) -> int:
    """The whole number that digits mean. Of thousands of digits, which Python refuses to convert, the first few count and the
    length: enough to say that it is too large."""
    digits = text.lstrip("+-")
    if len(digits) <= _DIGITS:
        return int(text)
    sign = -1 if text.startswith("-") else 1
    return sign * int(digits[:20]) * 10 ** (len(digits) - 20)


def listed(items: Sequence[str], separator: str = "; ") -> str:
    """The first ten items, and how many more there are."""
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more


def decoded(data: bytes, source: str) -> str:
    """UTF-8 bytes → text without a byte order mark. ValueError names `source`, line and byte of what is no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{source}: UTF-16 text; save it as UTF-8") from None
        line = len(_LINE_END.findall(data[: error.start].decode("latin-1"))) + 1
        at = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise ValueError(f"{source}, line {line}: not UTF-8 ({at}); save it as UTF-8") from None


def text_lines(text: str) -> list[str]:
    """The lines of a text, which end with LF, CR LF or CR and with nothing else."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def check_unicode(text: str, source: str) -> str:
    """The text itself. ValueError for half a character (a lone surrogate, as cutting an emoji in two leaves it), with its
    position."""
    if found := _SURROGATE.search(text):
        raise ValueError(f"{source}: a lone surrogate U+{ord(found.group()):04X} at position {found.start()}; remove it")
    return text
