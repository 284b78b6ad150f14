"""A network's config ⇄ a JSON object."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from bitdance.values import shown

T = TypeVar("T")


def config_from(cls: type[T], data: Any) -> T:
    """The dataclass `cls` from a JSON object; an unknown or missing key is an error."""
    if not isinstance(data, Mapping):
        raise ValueError(f"the config is a {type(data).__name__}; expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"unknown keys {shown(unknown)}; known are {', '.join(fields)}")
    if missing := [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in data]:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    return cls(**data)
