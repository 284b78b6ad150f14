"""A table of TOML → a frozen dataclass, every key and every value checked on the way, at every depth.

What a field allows is written on it: `Annotated[int, Range(1, 100)]` for a number (`bitdance/values.py`), `Annotated[Mapping[str,
Any], Table(…)]` for a table whose keys are no fields. Plain types allow every value of the type; numbers must be finite.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from bitdance.values import Range, shown
from lfq_tokenizer.text import check_unicode, nearest, printable

DEEPEST = 64  # tables within tables

# What fields allow, by the names that configs use for such numbers.
Steps = Annotated[int, Range(1, 10**9)]
StepsOrNone = Annotated[int, Range(0, 10**9)]
Share = Annotated[float, Range(0, 1, whole=False)]
Decay = Annotated[float, Range(0, 1, whole=False, open_high=True)]
Weight = Annotated[float, Range(0, 10**6, whole=False)]
Positive = Annotated[float, Range(0, 10**6, whole=False, open_low=True)]
Rate = Annotated[float, Range(0, 100, whole=False)]


class Checked:
    """A section of a config, `SECTION` by name: in Python too it holds no value that its fields do not allow."""

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for one in dataclasses.fields(self):  # type: ignore[arg-type]
            if (value := getattr(self, one.name)) is not None:
                convert(hints[one.name], value, f"{self.SECTION}.{one.name}")


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def check(self, name: str, value: Any) -> Any:
        if value not in self.words or isinstance(value, bool):
            raise ValueError(f"{name} = {shown(value)}; allowed are {', '.join(map(repr, self.words))}")
        return value


@dataclass(frozen=True)
class Table:
    """A table whose `known` keys have a `Range`, a `Choice`, a type or a `Table` of their own. `others` are the further
    names that are keys too, whose values must be finite; None: every name is one. `known[""]` is what the values of all
    names must be."""

    known: Mapping[str, Any] = field(default_factory=dict)
    others: Callable[[Mapping[str, Any]], Collection[str]] | Collection[str] | None = ()
    keys: Range | None = None  # keys are whole numbers in this range

    def check(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} = {shown(value)}; expected a table")
        return {key: self._checked(name, key, entry, value) for key, entry in value.items()}

    def _checked(self, name: str, key: str, value: Any, table: Mapping[str, Any]) -> Any:
        place = f"{name}.{printable(key)}"
        if self.keys is not None:
            number: Any = int(key) if key.isdecimal() and len(key) < 20 else key
            self.keys.check(f"{name}: key", number)
        if "" in self.known:
            return convert(self.known[""], value, place)
        if key in self.known:
            return convert(self.known[key], value, place)
        if self.others is not None:
            others = self.others(table) if callable(self.others) else self.others
            check_key(key, [*self.known, *sorted(set(others) - set(self.known))], f"{name}.")
        return finite(value, place)


def check_key(key: str, known: Collection[str], where: str = "") -> None:
    """ValueError with a suggestion for a key that is not known."""
    if key not in known:
        near = nearest(key, known)
        hint = f"did you mean {where}{near}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"unknown key {where}{printable(key)[:100]}; {hint}")


def finite(value: Any, name: str, depth: int = 0) -> Any:
    """The value itself. ValueError, naming the place, for NaN, infinity and whole numbers beyond 64 bits at any depth."""
    if depth > DEEPEST:
        raise ValueError(f"{name} is nested too deeply; at most {DEEPEST} tables within each other are read")
    if isinstance(value, str):
        check_unicode(value, name)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            finite(entry, f"{name}.{printable(key)}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            finite(entry, f"{name}[{number}]", depth + 1)
    elif isinstance(value, (int, float)):
        if not -(2**63) <= value < 2**63:  # NaN is neither
            raise ValueError(f"{name} = {shown(value)}; a finite number of at most 64 bits is allowed")
    else:
        raise ValueError(f"{name} = {shown(value)}; a number, a text, a truth value, a list or a table is allowed")
    return value


def build(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass `cls` with these values. ValueError names the key, what is allowed, or what it is called."""
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        check_key(key, known, where)
    return cls(**{key: convert(_declared(cls, key, hints[key]), value, f"{where}{key}") for key, value in values.items()})


# Ranges of classes that belong to other rooms; their own checks hold beside these.
DECLARED: dict[type, Mapping[str, Any]] = {}


def _declared(cls: type, key: str, hint: Any) -> Any:
    return DECLARED.get(cls, {}).get(key, hint)


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as what `hint` says: a type, `Annotated` one, a `Range`, `Choice` or `Table`, or a dataclass."""
    if isinstance(hint, Range):
        return hint.check(name, value)
    if isinstance(hint, (Choice, Table)):
        return hint.check(name, value)
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *notes = typing.get_args(hint)
        return convert(next((note for note in notes if isinstance(note, (Range, Choice, Table))), inner), value, name)
    if isinstance(hint, types.UnionType):  # SECTION | None
        if value is None:
            return None
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
        return convert(hint, value, name)
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        if isinstance(value, Mapping):
            return build(cls, value, name + ".")
        if isinstance(value, cls):  # it has been checked when it was made
            return value
    if origin is tuple:
        item, *others = typing.get_args(hint)
        length = None if others == [...] else 1 + len(others)
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
            raise ValueError(f"{name} = {shown(value)}; expected a list of {f'{length} values' if length else 'values'}")
        return tuple(convert(item, entry, f"{name}[{number}]") for number, entry in enumerate(value))
    if isinstance(hint, type):
        if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(Range(-math.inf, math.inf, whole=False, open_low=True, open_high=True).check(name, finite(value, name)))
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{name} = {shown(value)}; expected {hint.__name__}")
        return finite(value, name)
    raise AssertionError(f"{name}: a field of type {hint}")
