"""Scenes of icons with true attributes: one or two kinds of things, their number, colours and places, on a ground.

bitdance data pack scenes shards/scenes --size 128 --concepts 1000 --count 50000
bitdance data pack scenes shards/scenes-heldout --size 128 --concepts 1000 --count 1200 --split heldout

Every sample says in its attributes what GenEval's prompts say: `geneval` holds tag, include, exclude and prompt. What is held out
is decided by names and seed alone: two concepts that never stand together, a concept that never comes in that number or colour,
an icon that is never seen on that ground. `train` shows none of these, `heldout` nothing else. `untaught` holds other wordings,
which no caption has: another `order`, and a `name` of a thing that is held out as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.data.archives import CAPTIONS, DEFAULT_CACHE, STYLE_ARCHIVES, fetch, read_json
from stages.data.captions import PALETTE, captions_of
from stages.data.concepts import Concept, choose, draw, read_concepts
from stages.data.icons import IconStyle, packages_of
from stages.data.pieces import box_of, pieces
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.scene_names import NAMES
from stages.data.scene_words import LANDSCAPES, colourless, joined, one, related, reordered, several, worded

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
ONE_COLOUR = "high-contrast"  # the style whose icons take any colour
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # from the second thing to the first
# Things stand on a grid of 4×4 cells. At 128×128 pixels a cell is a block of 2×2 tokens of 16 pixels, so that a thing is the same
# blocks wherever it stands.
CELLS = 4
SIZES = {"": 3, "small": 2, "large": 4}  # of a single thing, in cells
AMONG = 2  # cells of a thing among others, which stand in halves of the picture
SKY_AND_EARTH = {
    "meadow": ((150, 205, 250), (86, 165, 70)),
    "beach": ((110, 195, 240), (238, 214, 160)),
    "desert": ((250, 205, 150), (205, 140, 80)),
    "snow": ((165, 190, 215), (245, 248, 252)),
    "night": ((20, 24, 60), (45, 50, 75)),
}
HORIZON = 2  # cells of sky
SEEN = 48  # difference of a channel from which on something is seen
DISTINCT = 120  # distance of two colours that are told apart
TRIES = 2000
HELD_NAMES = 0.3  # share of the other names that no caption has
DRAWN = 64  # side at which drawings are judged


@dataclass(frozen=True)
class SceneOptions:
    """Every field is a command-line option of `bitdance data pack scenes`."""

    size: int = 128
    styles: tuple[str, ...] = ("3d", "flat", ONE_COLOUR)
    concepts: str = "1000"
    count: int = 10_000
    hold_out: float = 0.15
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 1024:
            raise ValueError(f"--size {self.size}: give 32 to 1024 pixels")
        unknown = [style for style in self.styles if style not in STYLE_ARCHIVES]
        if unknown or len(set(self.styles)) != len(self.styles) or ONE_COLOUR not in self.styles or len(self.styles) < 2:
            needed = f"{ONE_COLOUR} (for colours) and some more of {', '.join(STYLE_ARCHIVES)}, each once"
            raise ValueError(f"--styles {','.join(self.styles)}: give {needed}")
        if self.count < 1:
            raise ValueError(f"--count {self.count}: give 1 or more")
        if not 0 < self.hold_out <= 0.5:
            raise ValueError(f"--hold-out {self.hold_out}: give a fraction above 0 and up to 0.5")
        if self.split not in ("train", "heldout"):
            raise ValueError(f"--split {self.split}: choose train or heldout")


@dataclass(frozen=True)
class Scene:
    """`concepts`: one, or two kinds of things; `count` of the first; `colors` of each, where they have one; `relation` of the
    first to the second; `size` of a single thing; `ground`: a colour of the palette or a landscape."""

    task: str
    style: str
    ground: str
    concepts: tuple[Concept, ...]
    count: int = 1
    colors: tuple[str, ...] = ()
    relation: str = ""
    size: str = ""

    @property
    def things(self) -> list[tuple[Concept, str]]:
        """(concept, ink) of every thing; an ink that is not asked for is the plainest one, "" where icons have colours."""
        plain = "" if self.style != ONE_COLOUR else "black" if told_apart("black", self.ground) else "white"
        inks = self.colors or (plain,) * len(self.concepts)
        first = [(self.concepts[0], inks[0])] * self.count
        return first + [(concept, ink) for concept, ink in zip(self.concepts[1:], inks[1:], strict=True)]

    def held_out(self, seed: int, fraction: float) -> bool:
        """Whether training never shows what is combined here."""
        codes = [concept.hexcode for concept in self.concepts]
        combined = [("pair", *sorted(codes))] if len(codes) == 2 else []
        if self.count > 1:
            combined.append(("count", codes[0], str(self.count)))
        combined += [("colour", code, color) for code, color in zip(codes, self.colors, strict=False)]
        if not combined:
            combined = [("ground", codes[0], self.style, self.ground)]
        return any(draw(seed, *names) < fraction for names in combined)

    def captions(self) -> list[str]:
        """All wordings, the one that names everything first."""
        first = self.concepts[0]
        if self.task == "single_object" and not self.size and self.ground in PALETTE:
            return captions_of(first.label, first.tags, self.style, self.ground)
        return worded(self._cores(), self.style, self.ground)

    def captions_beside(self) -> list[str]:
        """A few wordings: one for each order of the things, or three of a single thing."""
        cores = self._cores()
        return [text for core in cores for text in worded([core], self.style, self.ground)[: max(1, 3 // len(cores))]]

    def renamed(self, names: Mapping[str, str]) -> Scene | None:
        """The same with its things' other names, as far as `names` has them by label; None where it has none."""
        if not any(concept.label in names for concept in self.concepts):
            return None
        return replace(self, concepts=tuple(replace(c, label=names.get(c.label, c.label)) for c in self.concepts))

    def reordered(self) -> str:
        """A wording in an order that no caption has."""
        return reordered(*self._things(), self.style, self.ground)

    def _things(self) -> tuple[str, str, str]:
        """The first in words, its relation to the second, the second; "" for what there is not."""
        label, inks = self.concepts[0].label, self.colors or ("", "")
        first = several(self.count, label) if self.count > 1 else one(label, inks[0], self.size)
        return first, self.relation, one(self.concepts[1].label, inks[1]) if len(self.concepts) == 2 else ""

    def _cores(self) -> list[str]:
        """All wordings of what is seen, without style and ground."""
        first, relation, second = self._things()
        if not second:
            return [first]
        return related(first, relation, second) if relation else joined(first, second)

    def geneval(self) -> dict[str, Any]:
        """The line of GenEval's JSONL: classes are the concepts' labels."""
        include: list[dict[str, Any]] = [{"class": concept.label, "count": 1} for concept in self.concepts]
        include[0]["count"] = self.count
        for wanted, color in zip(include, self.colors, strict=False):
            wanted["color"] = color
        if self.relation:  # GenEval says it of the second one, relative to the first of the list
            include.reverse()
            include[1]["position"] = [self.relation, 0]
        found: dict[str, Any] = {"tag": self.task, "include": include}
        if self.task == "counting":
            found["exclude"] = [{"class": self.concepts[0].label, "count": self.count + 1}]
        return {**found, "prompt": self.captions()[0]}


class Shelf:
    """The icons of some styles, and the concepts that all of them draw in one piece."""

    def __init__(self, styles: tuple[str, ...], concepts: str, cache: str | Path = DEFAULT_CACHE) -> None:
        (entries,) = read_json(fetch(CAPTIONS, cache), "package/en/data.json")
        self._styles = {style: IconStyle(style, cache) for style in styles}
        drawn = [c for c in read_concepts(entries) if all(c.hexcode in style for style in self._styles.values())]
        self.drawing = lru_cache(maxsize=20_000)(self._drawing)
        self.seen = lru_cache(maxsize=None)(self._seen)
        self.styles = styles
        self.concepts = choose([c for c in drawn if all(self._in_one_piece(c.hexcode, style) for style in styles)], concepts)

    def _drawing(self, hexcode: str, style: str, ink: str = "", side: int = DRAWN) -> Image.Image:
        """RGBA (side, side); `ink`: a colour of the palette for icons that take any."""
        if ink in ("", "black"):
            return self._styles[style].drawing(hexcode, side, "#{:02x}{:02x}{:02x}".format(*PALETTE["black"]))
        coloured = Image.new("RGBA", (side, side), PALETTE[ink])
        coloured.putalpha(self.drawing(hexcode, style, "", side).getchannel("A"))
        return coloured

    def _in_one_piece(self, hexcode: str, style: str) -> bool:
        try:
            alpha = np.asarray(self.drawing(hexcode, style).getchannel("A"))
        except (ValueError, OSError):
            return False
        return len(pieces(alpha > 127, DRAWN // 12)) == 1

    def _seen(self, hexcode: str, style: str, ink: str, ground: str) -> bool:
        """Whether nearly all of an icon stands out from its ground."""
        pixels = np.asarray(self.drawing(hexcode, style, ink)).astype(int)
        solid = pixels[..., 3] > 127
        colors = [PALETTE[ground]] if ground in PALETTE else SKY_AND_EARTH[ground]
        apart = solid.copy()
        for color in colors:
            apart &= np.abs(pixels[..., :3] - np.array(color)).max(-1) > SEEN
        if apart.sum() <= 0.75 * solid.sum():
            return False
        (left, top, right, bottom), whole = box_of(apart), box_of(solid)
        return right - left > 0.92 * (whole[2] - whole[0]) and bottom - top > 0.92 * (whole[3] - whole[1])


def told_apart(one_color: str, other: str) -> bool:
    """Whether two colours of the palette differ enough."""
    return float(np.linalg.norm(np.subtract(PALETTE[one_color], PALETTE[other]))) > DISTINCT


class SceneSource:
    """Scenes of one split as a `PictureSource`, the tasks in turn."""

    def __init__(self, options: SceneOptions, cache: str | Path = DEFAULT_CACHE) -> None:
        self.options, self.expected = options, options.count
        self.shelf = Shelf(options.styles, options.concepts, cache)
        if len(self.shelf.concepts) < 2:
            raise ValueError(f"--concepts {options.concepts}: scenes need two concepts or more")
        held = {label for label in NAMES if draw(options.seed, "name", label) < HELD_NAMES}
        self._untaught = {label: name for label, name in NAMES.items() if label in held}
        self._taught = {label: name for label, name in NAMES.items() if label not in held}
        self._inkable = [concept for concept in self.shelf.concepts if colourless(concept.label)]

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        for i in range(self.options.count):
            rng = random.Random(f"{self.options.seed} {self.options.split} {i}")
            scene = self.scene(rng, TASKS[i % len(TASKS)])
            key = f"{self.options.split}-{i:07d}"
            if scene is None:
                yield Skipped(key, "no combination")
                continue
            about: dict[str, Any] = {
                "task": scene.task,
                "style": scene.style,
                "background": scene.ground,
                "concepts": [concept.label for concept in scene.concepts],
                "split": self.options.split,
                "geneval": scene.geneval(),
                "untaught": {"order": scene.reordered()},
            }
            if other := scene.renamed(self._untaught):
                about["untaught"]["name"] = other.captions()[0]
            other = scene.renamed(self._taught)
            captions = scene.captions() + (other.captions_beside() if other else [])
            yield CaptionedPicture(key, self.picture(scene, rng), captions, about)

    def scene(self, rng: random.Random, task: str) -> Scene | None:
        """A scene of this split that can be seen. None where there is none among many tries."""
        for _ in range(TRIES):
            scene = self._any(rng, task)
            held = scene.held_out(self.options.seed, self.options.hold_out)
            if held != (self.options.split == "heldout"):
                continue
            if all(self.shelf.seen(concept.hexcode, scene.style, ink, scene.ground) for concept, ink in scene.things):
                return scene
        return None

    def _any(self, rng: random.Random, task: str) -> Scene:
        coloured = task in ("colors", "color_attr")
        two = task in ("two_object", "position", "color_attr")
        count = rng.choice((2, 3, 4)) if task == "counting" else 1
        extra = task == "counting" and count < 4 and self.options.split == "train" and rng.random() < 0.3
        concepts = tuple(rng.sample(self._inkable if coloured else self.shelf.concepts, 2 if two or extra else 1))
        style = ONE_COLOUR if coloured else rng.choice(self.options.styles)
        landscape = style != ONE_COLOUR and rng.random() < 0.2
        ground = rng.choice(list(LANDSCAPES)) if landscape else rng.choice(list(PALETTE))
        free = [color for color in PALETTE if coloured and told_apart(color, ground)]
        colors = tuple(rng.sample(free, len(concepts))) if coloured else ()
        size = rng.choice(("", "", "small", "large")) if task == "single_object" else ""
        relation = rng.choice(list(STEPS)) if task == "position" else ""
        return Scene(task, style, ground, concepts, count, colors, relation, size)

    def picture(self, scene: Scene, rng: random.Random) -> Image.Image:
        """RGB (size, size)."""
        size = self.options.size
        cell, margin = size / CELLS, max(1, size // 32)
        canvas = ground_picture(scene.ground, size).convert("RGBA")
        for (concept, ink), (left, top, cells) in zip(scene.things, _places(scene, rng), strict=True):
            drawing = self.shelf.drawing(concept.hexcode, scene.style, ink, round(cells * cell) - 2 * margin)
            canvas.alpha_composite(drawing, (round(left * cell) + margin, round(top * cell) + margin))
        return canvas.convert("RGB")

    def describe(self) -> dict[str, Any]:
        return {
            "name": "scenes",
            "packages": packages_of(self.options.styles),
            "concepts": len(self.shelf.concepts),
            "arguments": asdict(self.options) | {"concepts": Path(self.options.concepts).name},
        }


def ground_picture(ground: str, size: int) -> Image.Image:
    """RGB (size, size): one colour, or sky and earth."""
    if ground in PALETTE:
        return Image.new("RGB", (size, size), PALETTE[ground])
    sky, earth = SKY_AND_EARTH[ground]
    picture = Image.new("RGB", (size, size), sky)
    picture.paste(earth, (0, round(HORIZON * size / CELLS), size, size))
    return picture


def _places(scene: Scene, rng: random.Random) -> list[tuple[int, int, int]]:
    """(left, top, side) of every thing, in cells."""
    count = len(scene.things)
    if count == 1:
        side = SIZES[scene.size]
        return [(rng.randint(0, CELLS - side), rng.randint(0, CELLS - side), side)]
    if count > 2:
        return [(*corner, AMONG) for corner in rng.sample([(x, y) for x in (0, AMONG) for y in (0, AMONG)], count)]
    dx, dy = STEPS[scene.relation] if scene.relation else rng.choice(list(STEPS.values()))
    across = rng.randint(0, CELLS - AMONG)
    pair = [(x, across, AMONG) for x in (0, AMONG)] if dx else [(across, y, AMONG) for y in (0, AMONG)]
    return pair if dx + dy < 0 else pair[::-1]
