"""Samples that are left out: counted by reason, and each named once on standard error."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping

from tqdm import tqdm

from lfq_tokenizer.text import printable

NAMED = 200  # by one process; further ones are only counted
_named: set[str] = set()


class Skips(Counter[str]):
    """How many samples were left out, by reason; `names` says which, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}

    def note(self, name: str, reason: str, why: str) -> None:
        """Count a sample under its reason and keep its name."""
        self[reason] += 1
        self.names[name] = why


def name_skipped(names: Mapping[str, str]) -> None:
    """Say on standard error which samples (name → why) are left out; nothing twice in one process."""
    for name, why in names.items():
        if name in _named or len(_named) > NAMED:
            continue
        _named.add(name)
        text = f"skipped {name}: {why}" if len(_named) <= NAMED else "skipped more samples, which are counted and not named"
        tqdm.write(f"bitdance: warning: {printable(text)[:1000]}", file=sys.stderr)
