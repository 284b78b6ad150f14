"""Icons of four open sets as captioned pictures: style × concept × background colour.

bitdance data pack icons shards/train --styles 3d,flat --concepts 200 --renderings-per-picture 0 --hold-out-pairs 0.15
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from stages.data.archives import CAPTIONS, DEFAULT_CACHE, STYLE_ARCHIVES, fetch, read_json, read_members
from stages.data.captions import PALETTE, captions_of
from stages.data.concepts import (
    GROUP_NAMES,
    Concept,
    choose,
    draw,
    held_out_backgrounds,
    held_out_concepts,
    plain_hexcode,
    read_concepts,
)
from stages.data.sample import CaptionedPicture, Skipped

CONTENT_SIDE = 0.9


@dataclass(frozen=True)
class IconOptions:
    """Which renderings to make; every field is a command-line option of `bitdance data pack icons`."""

    size: int = 64
    styles: tuple[str, ...] = ("3d", "flat")
    concepts: str = "all"
    backgrounds: tuple[str, ...] = tuple(PALETTE)
    renderings_per_picture: int = 0
    hold_out_pairs: float = 0.0
    hold_out_pictures: float = 0.0
    split: str = "train"
    seed: int = 0
    flags: bool = False
    skin_tones: bool = False

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 1024:
            raise ValueError(f"--size {self.size}: give 8 to 1024 pixels")
        for name, chosen, allowed in (
            ("styles", self.styles, STYLE_ARCHIVES),
            ("backgrounds", self.backgrounds, PALETTE),
        ):
            unknown = [item for item in chosen if item not in allowed]
            if unknown or not chosen or len(set(chosen)) != len(chosen):
                raise ValueError(f"--{name} {','.join(chosen)}: choose some of {', '.join(allowed)}, each once")
        for name in ("hold_out_pairs", "hold_out_pictures"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a fraction from 0 to 0.5")
        if self.split not in ("train", "heldout"):
            raise ValueError(f"--split {self.split}: choose train or heldout")
        if self.split == "heldout" and not (self.hold_out_pairs or self.hold_out_pictures):
            raise ValueError("--split heldout is empty without --hold-out-pairs or --hold-out-pictures")
        if self.renderings_per_picture < 0:
            raise ValueError(f"--renderings-per-picture {self.renderings_per_picture}: give 0 for every background, or a number")


class IconStyle:
    """One icon set: RGBA drawings by hexcode."""

    def __init__(self, style: str, cache: str | Path = DEFAULT_CACHE) -> None:
        self.style = style
        archive = fetch(STYLE_ARCHIVES[style], cache)
        self._webp: dict[str, bytes] = {}
        self._svg: dict[str, dict[str, Any]] = {}
        if style == "3d":
            for name, data in read_members(archive, lambda name: name.endswith(".webp")).items():
                self._webp[plain_hexcode(Path(name).stem)] = data
        else:
            icons, chars = read_json(archive, "package/icons.json", "package/chars.json")
            for code, name in chars.items():
                icon = _resolve_alias(icons, name)
                if icon is not None:
                    self._svg[plain_hexcode(code)] = icon

    def __contains__(self, hexcode: str) -> bool:
        return hexcode in self._webp or hexcode in self._svg

    def drawing(self, hexcode: str, size: int, ink: str) -> Image.Image:
        """RGBA (size, size): the icon within the middle 90 % of the side. `ink` colours one-colour icons.

        Raises ValueError or OSError for an icon that cannot be rendered.
        """
        if hexcode in self._webp:
            with Image.open(io.BytesIO(self._webp[hexcode]), formats=["WEBP"]) as picture:
                canvas = picture.convert("RGBA")
        else:
            canvas = _render_svg(self._svg[hexcode], 2 * size, ink)
        return _fit(canvas, size)


def _resolve_alias(icons: dict[str, Any], name: str) -> dict[str, Any] | None:
    """An icon's body, grid and flips; an alias takes the body of its parent."""
    flips = {"hFlip": False, "vFlip": False}
    for _ in range(5):
        entry = icons["icons"].get(name) or icons.get("aliases", {}).get(name)
        if entry is None:
            return None
        for flip in flips:
            flips[flip] ^= bool(entry.get(flip, False))
        if "body" in entry:
            grid = [entry.get(side, icons.get(side, 16)) for side in ("width", "height")]
            return {"body": entry["body"], "grid": grid, "origin": [entry.get("left", 0), entry.get("top", 0)], **flips}
        name = entry["parent"]
    return None


def _render_svg(icon: dict[str, Any], side: int, ink: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("the flat, noto and high-contrast styles are SVG; `pip install resvg-py` renders them") from error
    (width, height), (left, top) = icon["grid"], icon["origin"]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side}" color="{ink}">{icon["body"]}</svg>'
    )
    data = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(data)), formats=["PNG"]) as png:
        picture = png.convert("RGBA")
    if icon["hFlip"]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if icon["vFlip"]:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture


def _fit(canvas: Image.Image, size: int) -> Image.Image:
    """Keep the set's own proportions (a small square stays small), but leave 5 % of the side free at each edge."""
    box = canvas.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        raise ValueError("the drawing is empty")
    content = canvas.crop(box)
    scale = min(size / max(canvas.size), CONTENT_SIDE * size / max(content.size))
    width, height = (max(1, round(scale * side)) for side in content.size)
    content = content.resize((width, height), Image.Resampling.LANCZOS)
    fitted = Image.new("RGBA", (size, size))
    fitted.paste(content, ((size - width) // 2, (size - height) // 2))
    return fitted


def on_background(drawing: Image.Image, background: str) -> Image.Image:
    """RGB: the RGBA drawing alpha-composited on a colour of the palette."""
    ground = Image.new("RGBA", drawing.size, (*PALETTE[background], 255))
    return Image.alpha_composite(ground, drawing).convert("RGB")


def ink_for(background: str) -> str:
    """Black ink, or white where black would not be seen."""
    red, green, blue = PALETTE[background]
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 90 else "#ffffff"


class IconSource:
    """Renderings of one split as a `PictureSource`.

    A concept is used where at least one chosen style draws it; with `concepts` a number, where all of them do. The
    split is decided by names and seed alone: `train` and `heldout` of the same options never share a (style, concept,
    background).
    """

    def __init__(self, options: IconOptions, cache: str | Path = DEFAULT_CACHE) -> None:
        self.options = options
        (entries,) = read_json(fetch(CAPTIONS, cache), "package/en/data.json")
        self._styles = {style: IconStyle(style, cache) for style in options.styles}
        concepts = read_concepts(entries, options.flags, options.skin_tones)
        quorum = all if options.concepts.isdigit() else any
        drawn = [concept for concept in concepts if quorum(concept.hexcode in style for style in self._styles.values())]
        self.concepts = choose(drawn, options.concepts)
        self._plan = list(self._renderings())
        self.expected = len(self._plan)
        if not self._plan:
            raise ValueError(f"the {options.split} split is empty: hold out a larger fraction, or choose more concepts")

    def _renderings(self) -> Iterator[tuple[Concept, str, str, str]]:
        """(concept, style, background, why held out) of this split."""
        options = self.options
        pictures = [
            (concept, style) for concept in self.concepts for style in options.styles if concept.hexcode in self._styles[style]
        ]
        apart = held_out_concepts(self.concepts, options.hold_out_pictures, options.seed)
        names = [_name(concept, style) for concept, style in pictures if concept.hexcode not in apart]
        held = held_out_backgrounds(names, options.backgrounds, options.hold_out_pairs, options.seed)
        for concept, style in pictures:
            if concept.hexcode in apart:
                allowed, why = (options.backgrounds, "picture") if options.split == "heldout" else ((), "")
            else:
                away = held[_name(concept, style)]
                why = "pair" if options.split == "heldout" else ""
                allowed = tuple(ground for ground in options.backgrounds if (ground in away) == (options.split == "heldout"))
            for background in self._some(allowed, _name(concept, style)):
                yield concept, style, background, why

    def _some(self, backgrounds: Sequence[str], picture: str) -> list[str]:
        count = self.options.renderings_per_picture or len(backgrounds)
        drawn = sorted(backgrounds, key=lambda background: draw(self.options.seed, "rendering", picture, background))[:count]
        return [background for background in self.options.backgrounds if background in drawn]

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        @lru_cache(maxsize=4)
        def drawing(style: str, hexcode: str, ink: str) -> Image.Image:
            return self._styles[style].drawing(hexcode, self.options.size, ink)

        for concept, style, background, why in self._plan:
            key = f"{_name(concept, style)}-{background}"
            try:
                picture = on_background(drawing(style, concept.hexcode, ink_for(background)), background)
            except (ValueError, OSError):
                yield Skipped(key, "unrenderable")
                continue
            attributes = {
                "concept": concept.label,
                "style": style,
                "background": background,
                "hexcode": concept.hexcode,
                "group": GROUP_NAMES[concept.group],
                "tags": list(concept.tags),
                "split": self.options.split,
            }
            if why:
                attributes["held_out"] = why
            yield CaptionedPicture(key, picture, captions_of(concept.label, concept.tags, style, background), attributes)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "icons",
            "packages": packages_of(self.options.styles),
            "concepts": len(self.concepts),
            # a list of concepts is named without its folder: where it lies is nobody's business
            "arguments": asdict(self.options) | {"concepts": Path(self.options.concepts).name},
        }


def packages_of(styles: Sequence[str]) -> dict[str, str]:
    """PACKAGE@VERSION → SHA-256 of what icons of these styles and their captions are read from."""
    archives = [CAPTIONS, *(STYLE_ARCHIVES[style] for style in styles)]
    return {f"{archive.package}@{archive.version}": archive.sha256 for archive in archives}


def _name(concept: Concept, style: str) -> str:
    return f"{concept.hexcode}-{style}"
