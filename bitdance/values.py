"""One check for the numbers that people give, whichever door they come through: flag, JSONL, TOML, PNG, Python, HTTP.

check_number("steps", value, "jobs.jsonl line 3")
→ ValueError: jobs.jsonl line 3: steps = 0; a whole number from 1 to 10000 is allowed
"""

import math
import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from lfq_tokenizer.text import printable, whole_number

_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][+-]?[0-9]{1,9})?")
_LONGEST = 60  # characters of a value that an error shows


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both allowed (or, with `open_low`, `open_high`, the number itself not); whole ones only
    where `whole`. `hint` ends the message."""

    low: float
    high: float
    whole: bool = True
    open_low: bool = False
    open_high: bool = False
    hint: str = ""

    def check(self, name: str, value: Any, source: str = "") -> Any:
        """`value` as an int or a float. ValueError, which names `source`, name, value and what is allowed, for another kind of
        value (a truth value and a text are no numbers), NaN, and what lies outside."""
        number = self.number(value)
        if number is None:
            raise ValueError(f"{source}{': ' if source else ''}{name} = {shown(value)}; {self.words} is allowed{self.hint}")
        return number

    def number(self, value: Any) -> int | float | None:
        """`value` as an int or a float, None where it is not allowed."""
        if type(value) is int and self.low < value < self.high:  # nearly always
            return value if self.whole else float(value)
        kind: Any = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return None
        # compared before it is converted: a whole number of 400 digits has no float
        above = value > self.low or (value == self.low and not self.open_low)
        below = value < self.high or (value == self.high and not self.open_high)
        if not (above and below):
            return None
        return int(value) if self.whole else float(value) + 0.0  # −0.0 becomes 0.0

    @property
    def words(self) -> str:
        """What is allowed, in words."""
        kind = "a whole number" if self.whole else "a number"
        low = f"above {_plain(self.low)}" if self.open_low else f"from {_plain(self.low)}"
        if self.high == math.inf:
            return f"{kind} {low}" + ("" if self.open_low else " on")
        return f"{kind} {low}{', below' if self.open_high else ', up to' if self.open_low else ' to'} {_plain(self.high)}"


# What is generated. Sizes in pixels; steps of the solver per block.
RANGES = {
    "seed": Range(0, 2**63 - 1),
    "height": Range(1, 65_536),
    "width": Range(1, 65_536),
    "steps": Range(1, 10_000),
    "last_steps": Range(1, 10_000),
    "n": Range(1, 100_000),
    "batch_size": Range(1, 4096),
    "count": Range(1, 10**9 - 1),
    "guidance": Range(0, 1000, whole=False, hint="; 1 and below switch guidance off"),
    "guidance_interval": Range(0, 1, whole=False),
    "class": Range(0, 1 << 20),
    "tolerance": Range(0, 1e300, whole=False),
    "at_least": Range(0, 1, whole=False),
    "tau": Range(0, 1000, whole=False, open_low=True),
    "extend": Range(0, 65_536),
    "strength": Range(0, 1, whole=False, open_low=True),
    "queue": Range(1, 100_000),
    "port": Range(0, 65_535, hint="; 0 takes a free one"),
    "time_limit": Range(0, 1e6, whole=False, open_low=True),
    "lora_scale": Range(-1000, 1000, whole=False, hint="; 1 is as trained"),
}
# other names of the same values
RANGES["num_inference_steps"], RANGES["guidance_scale"] = RANGES["steps"], RANGES["guidance"]
RANGES["num_images_per_prompt"] = RANGES["pictures"] = RANGES["n"]


def check_number(name: str, value: Any, source: str = "") -> Any:
    """The value of that name as an int or a float, if it is a number in its range; see `Range.check`."""
    return RANGES[name].check(name, value, source)


def check_interval(value: Any, source: str = "", name: str = "guidance_interval") -> tuple[float, float]:
    """Two times with 0 ≤ low ≤ high ≤ 1. ValueError for anything else."""
    pair = list(value) if isinstance(value, (list, tuple)) else []
    numbers = [RANGES["guidance_interval"].number(number) for number in pair]
    if len(numbers) != 2 or numbers[0] is None or numbers[1] is None or numbers[0] > numbers[1]:
        text = f"{name} = {shown(value)}; two times with 0 ≤ low ≤ high ≤ 1 are allowed, for instance 0.3 and 1"
        raise ValueError(f"{source}: {text}" if source else text)
    return float(numbers[0]), float(numbers[1])


def from_text(name: str, text: str, source: str) -> Any:
    """The number that a flag's text means, checked. Digits, sign, point and exponent only, as in JSON."""
    return check_number(name, read_number(text, RANGES[name].whole), source)


def read_number(text: str, whole: bool) -> Any:
    """The number that a text means, the text itself where it means none: digits, sign and, unless `whole`, point and exponent."""
    if _WHOLE.fullmatch(text):
        return whole_number(text)
    return float(text) if not whole and _DECIMAL.fullmatch(text) else text


def shown(value: Any) -> str:
    """A value as an error shows it: at most 60 characters, nothing that steers a terminal."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a number of about {int(value.bit_length() * 0.30103)} digits"
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    text = printable(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
