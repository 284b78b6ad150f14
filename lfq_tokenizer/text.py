"""Text of strangers: bytes → lines → what may be shown on a terminal."""

import difflib
import math
import re
from collections.abc import Collection, Sequence

_DIGITS = 4000
SHOWN = 10  # offenders listed in an error
_COMPARED = 100  # letters of a name that is not known
HOUR, DAY = 3600.0, 86_400.0
# unit, its seconds, and from how many seconds on the next one reads better
UNITS = (
    ("second", 1.0, 90.0),
    ("minute", 60.0, 1.5 * HOUR),
    ("hour", HOUR, 2 * DAY),
    ("day", DAY, 700 * DAY),
    ("year", 365.25 * DAY, math.inf),
)
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


def nearest(name: str, known: Collection[str], least: float = 0.5) -> str | None:
    """The one of `known` that a misspelt name may mean; None where all are farther than `least`, of 1 for the same letters."""
    near = difflib.get_close_matches(name[:_COMPARED], known, 1, least)
    return near[0] if near else None


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A question for an error about a name that is not known, "" where none of `known` is near."""
    near = nearest(name, known)
    return f"did you mean {near!r}? " if near else ""


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


def time_text(seconds: float) -> str:
    """Seconds in the unit that fits: "45 seconds", "12 minutes", "3.4 hours", "2.1 days", "14 years"."""
    unit, size = next((unit, size) for unit, size, until in UNITS if seconds < until)
    number = seconds / size
    text = f"{number:,.1f}" if number < 10 and unit != "second" else f"{number:,.0f}"
    return f"{text} {unit}{'' if text in ('1', '1.0') else 's'}"
