"""Which concepts, in which order, and which renderings are held out: functions of names and a seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfq_tokenizer.text import decoded, text_lines

_COMPONENTS_AND_FLAGS = (None, 2, 9)
_SHOWABLE_GROUPS = (3, 4, 5, 6, 7)  # animals & nature, food & drink, travel & places, activities, objects
GROUP_NAMES = {
    0: "smileys & emotion",
    1: "people & body",
    3: "animals & nature",
    4: "food & drink",
    5: "travel & places",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}


@dataclass(frozen=True)
class Concept:
    """An idea that one or more icon sets draw. `hexcode` is lower case and without the variation selector fe0f."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: int
    subgroup: int


def plain_hexcode(code: str) -> str:
    """The key on which the icon sets and the captions are joined."""
    return code.lower().replace("-fe0f", "")


def read_concepts(entries: Sequence[Mapping[str, Any]], flags: bool = False, skin_tones: bool = False) -> list[Concept]:
    """Concepts of emojibase's `en/data.json`, in its order; flags and skin-tone variants only where asked for."""
    concepts: dict[str, Concept] = {}
    for entry in entries:
        group = entry.get("group")
        if group in _COMPONENTS_AND_FLAGS and not (flags and group == 9):
            continue
        for variant in [entry, *(entry.get("skins", []) if skin_tones else [])]:
            label = variant["label"].translate({0x2019: "'", 0x201C: None, 0x201D: None})
            code = plain_hexcode(variant["hexcode"])
            tags = tuple(variant.get("tags", entry.get("tags", [])))
            concepts.setdefault(code, Concept(code, label, tags, int(group), int(entry.get("subgroup", -1))))
    return list(concepts.values())


def rank(concepts: Sequence[Concept]) -> list[Concept]:
    """Most showable first: short labels of things, taken in turn from the groups and from the subgroups within a group.

    A prefix of any length is diverse, and a longer prefix contains a shorter one.
    """
    queues = [_rank_group([concept for concept in concepts if concept.group == group]) for group in _SHOWABLE_GROUPS]
    ranked = _in_turn(queues)
    chosen = {concept.hexcode for concept in ranked}
    return ranked + [concept for concept in concepts if concept.hexcode not in chosen]


def _rank_group(concepts: Sequence[Concept]) -> list[Concept]:
    ranked: list[Concept] = []
    for words in (r"[a-z]+", r"[a-z]+ [a-z]+"):
        subgroups: dict[int, list[Concept]] = {}
        for concept in concepts:
            if re.fullmatch(words, concept.label):
                subgroups.setdefault(concept.subgroup, []).append(concept)
        ranked += _in_turn(list(subgroups.values()))
    return ranked


def _in_turn(queues: Sequence[Sequence[Concept]]) -> list[Concept]:
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def choose(concepts: Sequence[Concept], wish: str) -> list[Concept]:
    """`wish` is "all", a number (the first N of `rank`), or a text file with one label or hexcode a line.

    Raises ValueError for a number out of range and for a line that names no concept, FileNotFoundError for a missing
    file.
    """
    if wish == "all":
        return list(concepts)
    if wish.lstrip("-").isdigit():
        if not 1 <= int(wish) <= len(concepts):
            raise ValueError(f"--concepts {wish}: the chosen styles share {len(concepts)} concepts; give at most that, or all")
        return rank(concepts)[: int(wish)]
    if not Path(wish).is_file():
        raise FileNotFoundError(f"--concepts {wish}: no such file; give a number, all, or a file with one label a line")
    by_name = {concept.label.lower(): concept for concept in concepts} | {concept.hexcode: concept for concept in concepts}
    chosen: dict[str, Concept] = {}
    for number, line in enumerate(text_lines(decoded(Path(wish).read_bytes(), Path(wish).name)), start=1):
        name = line.strip().lower()
        if not name or name.startswith("#"):
            continue
        concept = by_name.get(name) or by_name.get(plain_hexcode(name))
        if concept is None:
            raise ValueError(f"{Path(wish).name}, line {number}: no chosen style draws {line.strip()!r}")
        chosen[concept.hexcode] = concept
    if not chosen:
        raise ValueError(f"--concepts {Path(wish).name}: the file names no concept; write one label a line")
    return list(chosen.values())


def draw(seed: int, *names: str) -> float:
    """A number in [0, 1) from the seed and the names only, so that adding a concept moves no other choice."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def held_out_concepts(concepts: Sequence[Concept], fraction: float, seed: int) -> set[str]:
    """Hexcodes of the concepts that training never sees, in any style."""
    order = sorted(concepts, key=lambda concept: draw(seed, "concept", concept.hexcode))
    return {concept.hexcode for concept in order[: round(fraction * len(order))]}


def held_out_backgrounds(
    pictures: Sequence[str], backgrounds: Sequence[str], fraction: float, seed: int
) -> dict[str, frozenset[str]]:
    """For each picture name the backgrounds that training never shows behind it.

    A picture loses at most half of its backgrounds, and a background at most half of the pictures; both bounds win over
    `fraction`.
    """
    held: dict[str, frozenset[str]] = {}
    times_held = dict.fromkeys(backgrounds, 0)
    for picture in pictures:
        share = fraction * len(backgrounds)
        count = int(share) + (draw(seed, "share", picture) < share - int(share))
        order = sorted(backgrounds, key=lambda background: draw(seed, "pair", picture, background))
        free = [background for background in order if 2 * (times_held[background] + 1) <= len(pictures)]
        held[picture] = frozenset(free[: min(count, len(backgrounds) // 2)])
        for background in held[picture]:
            times_held[background] += 1
    return held
