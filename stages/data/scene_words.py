"""Captions of scenes: which things, how many, of which colour, where, in which style, on what ground."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.data.captions import (
    DEFAULT_BACKGROUND,
    DEFAULT_STYLE,
    PALETTE,
    STYLE_WORDS,
    article,
    head_of,
    is_plural,
    with_article,
)

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "left of": ("to the left of", "left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BESIDE = ("and", "next to", "together with")
LANDSCAPES = {"meadow": "in a meadow", "beach": "on a beach", "desert": "in a desert", "snow": "in the snow", "night": "at night"}
_PLURALS = {"mouse": "mice", "ox": "oxen", "sheep": "sheep", "fish": "fish", "deer": "deer", "bison": "bison", "leaf": "leaves"}
_PLURALS |= {"knife": "knives", "wolf": "wolves", "calf": "calves", "loaf": "loaves", "man": "men", "woman": "women"}
_PLURALS |= {"child": "children", "foot": "feet", "tooth": "teeth", "person": "people"}


def plural(label: str) -> str:
    """ "a fox" is one, "foxes" are several; "grapes" stay what they are."""
    if is_plural(label):
        return label
    head = head_of(label)
    *before, word = head.split(" ")
    if word in _PLURALS:
        word = _PLURALS[word]
    elif re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    else:
        word += "es" if re.search(r"(s|x|z|ch|sh)$", word) else "s"
    return " ".join([*before, word]) + label[len(head) :]


def one(label: str, color: str = "", size: str = "") -> str:
    """ "a fox", "a red heart", "a small owl", "small gloves"."""
    words = " ".join(filter(None, (size, color)))
    if not words or with_article(label) == label:
        return " ".join(filter(None, (words, with_article(label))))
    return f"{article(words)}{words} {label}"


def several(count: int, label: str) -> str:
    """ "three foxes"."""
    return one(label) if count == 1 else f"{NUMBERS[count]} {plural(label)}"


def joined(first: str, second: str) -> list[str]:
    """Two things without an order, the plainest wording first."""
    return [f"{a} {word} {b}" for word in BESIDE for a, b in ((first, second), (second, first))]


def related(first: str, relation: str, second: str) -> list[str]:
    """`first` is `relation` `second`: all wordings, from either side."""
    return [
        f"{a} {word} {b}"
        for a, name, b in ((first, relation, second), (second, INVERSE[relation], first))
        for word in RELATIONS[name]
    ]


def _where(ground: str) -> tuple[str, str]:
    """ "on a blue background" and "on blue"; of a landscape one wording."""
    return (LANDSCAPES[ground],) * 2 if ground in LANDSCAPES else (f"on {article(ground)}{ground} background", f"on {ground}")


def reordered(first: str, relation: str, second: str, style: str, ground: str) -> str:
    """The same in an order that `worded` never has, though of words that it has: for what a model makes of new phrasings."""
    core = f"{RELATIONS[relation][0]} {second}, {first}" if relation else ", ".join(filter(None, (second, first)))
    return f"{_where(ground)[0]}, {core}, {STYLE_WORDS[style]} style"


def worded(cores: Sequence[str], style: str, ground: str) -> list[str]:
    """What is seen → captions; the first names everything. As for single icons, no style means 3D and no ground means white."""
    word = STYLE_WORDS[style]
    a_picture = f"{article(word)}{word} style picture of"
    on, short = _where(ground)
    found = []
    for core in cores:
        found += [f"{core}, {word} style, {on}", f"{core} {on}, {word} style", f"{a_picture} {core} {on}"]
        if style == DEFAULT_STYLE:
            found += [f"{core} {on}", f"{core} {short}"]
        if ground == DEFAULT_BACKGROUND:
            found.append(f"{core}, {word} style")
        if style == DEFAULT_STYLE and ground == DEFAULT_BACKGROUND:
            found.append(core)
    return list(dict.fromkeys(found))


def colourless(label: str) -> bool:
    """Whether a label says no colour itself, so that it can be given one ("a red apple" cannot)."""
    return not set(label.lower().split()) & {*PALETTE, "grey", "golden", "silver"}
