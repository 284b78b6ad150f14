"""Captions of the icon pictures: what a caption leaves out is the default.

The rule that keeps every caption unambiguous: **a caption without a style means the 3d style, and a caption without a
background means white.** "a red apple" is therefore a 3D red apple on white, and nothing else; "a red apple on a blue
background" is 3D.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

DEFAULT_STYLE = "3d"
DEFAULT_BACKGROUND = "white"

STYLE_WORDS = {"3d": "3D", "flat": "flat", "noto": "Noto", "high-contrast": "high contrast"}

PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (220, 38, 38),
    "orange": (245, 130, 32),
    "yellow": (250, 215, 40),
    "green": (34, 160, 60),
    "cyan": (70, 210, 220),
    "blue": (37, 80, 220),
    "purple": (128, 40, 170),
    "pink": (250, 150, 200),
    "brown": (120, 72, 32),
}


def nearest_color(color: Sequence[float]) -> str:
    """The name of the palette's colour that is nearest to red, green and blue in 0 … 255."""
    return min(PALETTE, key=lambda name: sum((a - b) ** 2 for a, b in zip(color, PALETTE[name], strict=True)))


_CANONICAL = "{a_concept}, {style} style, on {a_background} background"
_FULL = (
    "{concept}, {style} style, {background} background",
    "{a_concept} in {style} style on {a_background} background",
    "{a_concept} on {background}, {style} style",
    "{a_style} style picture of {a_concept} on {a_background} background",
    "{style} style {concept} on {background}",
    "on {a_background} background, {a_concept} in {style} style",
    "{background} background, {concept}, {style} style",
)
_KEYWORDS = (
    "{a_concept} ({tags}), {style} style, on {a_background} background",
    "{concept}, {tags}, {style} style, {background} background",
)
_DEFAULT_STYLE_ONLY = (
    "{a_concept} on {a_background} background",
    "{concept} on {background}",
)
_DEFAULT_BACKGROUND_ONLY = (
    "{a_concept}, {style} style",
    "{concept}, {style} style",
)
_BOTH_DEFAULTS = ("{a_concept}", "{concept}")

_MASS_NOUNS = frozenset(
    """
    aikido aquarius aries bacon badminton bamboo bowling bread broccoli butter camping cancer capricorn cheese
    coral corn curry dna fire fog foggy fondue garlic gemini golf hockey ice judo kaaba lacrosse leo libra
    lightning littering locked luggage mate meat milk money oden ophiuchus pisces pong popcorn racing rice
    sagittarius sake salt scorpio smoking snow soap spaghetti sushi taurus tea tennis thread unlocked virgo water
    wine wood yarn
    """.split()  # noqa: SIM905
)
_PLURALS_WITHOUT_S = frozenset(("children", "feet", "men", "people", "skis", "teeth", "women"))
_DOERS = frozenset(("cat", "face", "index", "man", "people", "person", "woman"))
_SINGULARS_WITH_S = ("ss", "us", "is", "as", "os")


def article(phrase: str) -> str:
    """The article of a phrase, by its first sound, with a blank behind it ("a " or "an ")."""
    first = phrase.lower()
    if first.startswith(("uni", "uku", "uti", "eu", "one", "once", "us")):
        return "a "
    return "an " if first.startswith(("a", "e", "i", "o", "u", "hour", "honest", "x-ray")) else "a "


def with_article(concept: str) -> str:
    """The concept as one says it in a sentence: "a red apple", "an owl", "grapes", "kiss: woman, man"."""
    if not concept[:1].isalpha() or ":" in concept or concept.endswith(("o'clock", "-thirty")):
        return concept
    if concept.split()[0] in ("people", "no", "input"):
        return concept
    if is_plural(concept) or head_of(concept).lower().split()[-1] in _MASS_NOUNS:
        return concept
    return article(concept) + concept


def head_of(concept: str) -> str:
    """The part of a name that becomes plural: "face" of "face with open hands", "woman" of "woman gesturing OK"."""
    words = re.split(r" (?:with|of|in|on|at|behind|over|without) |: ", concept)[0].split(" ")
    doing = (k for k in range(1, len(words)) if words[k].endswith("ing") and words[k - 1].lower() in _DOERS)
    return " ".join(words[: next(doing, len(words))])


def is_plural(concept: str) -> bool:
    """Whether a name means several already: "grapes" does, "face with tears" does not."""
    noun = head_of(concept).lower().split()[-1]
    return noun in _PLURALS_WITHOUT_S or (noun.endswith("s") and not noun.endswith(_SINGULARS_WITH_S))


def _fill(template: str, concept: str, style: str, background: str, tags: str = "") -> str:
    if style not in STYLE_WORDS:
        raise ValueError(f"unknown style {style!r}; choose one of {', '.join(STYLE_WORDS)}")
    if background not in PALETTE:
        raise ValueError(f"unknown background {background!r}; choose one of {', '.join(PALETTE)}")
    word = STYLE_WORDS[style]
    return template.format(
        concept=concept,
        a_concept=with_article(concept),
        style=word,
        a_style=article(word) + word,
        background=background,
        a_background=article(background) + background,
        tags=tags,
    )


def full_caption(concept: str, style: str, background: str) -> str:
    """The canonical caption, which names all three: "a red apple, 3D style, on a blue background"."""
    return _fill(_CANONICAL, concept, style, background)


def caption_templates(style: str, background: str, keywords: bool = False) -> tuple[str, ...]:
    """The templates that are true of a rendering, the canonical one first.

    Full variations follow, then those that leave out what is a default.
    """
    templates: tuple[str, ...] = (_CANONICAL, *_FULL)
    if keywords:
        templates += _KEYWORDS
    if style == DEFAULT_STYLE:
        templates += _DEFAULT_STYLE_ONLY
    if background == DEFAULT_BACKGROUND:
        templates += _DEFAULT_BACKGROUND_ONLY
    if style == DEFAULT_STYLE and background == DEFAULT_BACKGROUND:
        templates += _BOTH_DEFAULTS
    return templates


def captions_of(concept: str, tags: Sequence[str], style: str, background: str) -> list[str]:
    """All captions of one rendering; index 0 is `full_caption(concept, style, background)`.

    Keywords are those tags that add something: neither a colour of the palette nor words of the concept itself.
    """
    own = set(concept.lower().replace("-", " ").split())
    keywords = [tag for tag in tags if tag not in PALETTE and tag.lower() not in own and tag.isascii() and tag.isalpha()]
    joined = ", ".join(keywords[:3])
    captions = [
        _fill(template, concept, style, background, joined)
        for template in caption_templates(style, background, keywords=bool(joined))
    ]
    return list(dict.fromkeys(captions))
