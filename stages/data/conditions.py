"""Conditions on a sample's attributes, such as `aesthetic >= 5.5` or `license in ['cc0', 'cc-by']`.

A condition is one comparison: a name, an operator and a literal. It is parsed, never evaluated as code.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "in": lambda value, allowed: value in allowed,
}
_NAME = r"[A-Za-z_][\w-]*(?:\.[\w-]+)*"
_CONDITION = re.compile(rf"\s*({_NAME})(?:\s*(==|!=|<=|>=|<|>)|\s+(in)\b)\s*(\S.*?)\s*", re.DOTALL)
_LONGEST = 10_000
_EXAMPLES = "expected NAME OPERATOR VALUE, for example aesthetic >= 5.5, license in ['cc0', 'cc-by'] or source.name != 'web'"


@dataclass(frozen=True)
class Condition:
    """`name` (dots lead into nested objects) compared with the literal `value`; `text` as the user wrote it."""

    text: str
    name: str
    comparison: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Condition:
        """ValueError for anything but one comparison of a name with a literal that it can be compared with."""
        match = _CONDITION.fullmatch(text) if len(text) <= _LONGEST else None
        if match is None:
            raise ValueError(f"condition {text[:200]!r}: {_EXAMPLES}")
        name, sign, word, literal = match.groups()
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"condition {text!r}: {literal!r} is no number, quoted text or list of them; {_EXAMPLES}") from error
        comparison = sign or word
        if comparison == "in" and not isinstance(value, (list, tuple)):
            raise ValueError(f"condition {text!r}: 'in' needs a list; {_EXAMPLES}")
        if comparison in ("<", "<=", ">", ">=") and (isinstance(value, bool) or not isinstance(value, (int, float, str))):
            raise ValueError(f"condition {text!r}: {comparison} needs a number or quoted text; {_EXAMPLES}")
        return cls(text.strip(), name, comparison, value)

    def failure(self, attributes: Mapping[str, Any]) -> str:
        """Why `attributes` fail the condition, as a reason to count; "" where they meet it."""
        value: Any = attributes
        for part in self.name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return f"condition {self.text}: attribute missing"
            value = value[part]
        try:
            met = _COMPARISONS[self.comparison](value, self.value)
        except TypeError:
            return f"condition {self.text}: attribute of another type"
        return "" if met else f"condition {self.text}"


def first_failure(conditions: Sequence[Condition], attributes: Mapping[str, Any]) -> str:
    """The reason of the first condition that `attributes` fail; "" where they meet all."""
    return next(filter(None, (condition.failure(attributes) for condition in conditions)), "")
