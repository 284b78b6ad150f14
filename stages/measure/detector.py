"""Which icons a picture shows, where, and of which colour: what stands out from the ground is compared with drawings.

A picture's ground is, row by row, the median colour of its left and right edge. What differs from it falls into pieces; each
piece, cut out at its own box, is compared with every drawing laid on the same ground, and the nearest is what it shows. So the
detector knows every icon of a `Shelf`, and nothing else; a smear is also taken for something.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.data.captions import nearest_color
from stages.data.pieces import box_of, pieces
from stages.data.scenes import ONE_COLOUR, Shelf

Array = NDArray[Any]
SIDE = 128  # pictures are looked at in this size
GAP = 8  # parts of one thing are at most so many pixels apart
STANDS_OUT = 40  # difference of a channel
LEAST = 0.004  # share of the picture that a piece takes at least
FEATURES = 20  # a piece is compared in FEATURES × FEATURES pixels
SHAPE_WEIGHT = 3000.0  # of the squared logarithm of the ratio of two aspect ratios, beside squared differences of pixels


@dataclass(frozen=True)
class Found:
    """A piece of a picture: the concept's label, the style, the colour of the palette that most of it has, the box in shares of
    the side (left, top, right, bottom), and the mean squared difference of a pixel (0 … 65025) to the drawing."""

    label: str
    style: str
    color: str
    box: tuple[float, float, float, float]
    distance: float

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y)."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Detector:
    """Knows the drawings of a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.names = [(concept.label, style) for concept in shelf.concepts for style in shelf.styles]
        drawn = [_features(shelf.drawing(concept.hexcode, style)) for concept in shelf.concepts for style in shelf.styles]
        self._inked = np.array([style == ONE_COLOUR for _, style in self.names])
        self._ink_NFF3 = np.stack([ink for ink, _, _ in drawn])  # colours times opacity
        self._clear_NFF1 = np.stack([1 - alpha for _, alpha, _ in drawn])
        self._aspect_N = np.array([aspect for _, _, aspect in drawn], np.float32)

    def __call__(self, picture: Image.Image) -> list[Found]:
        """What a picture shows, from the top."""
        pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        edges = np.concatenate([pixels[:, :2], pixels[:, -2:]], axis=1)
        ground = np.broadcast_to(np.median(edges, axis=1, keepdims=True), pixels.shape)
        differs = np.abs(pixels - ground).max(-1)
        found = [part for part in pieces(differs > STANDS_OUT, GAP) if part.sum() >= LEAST * SIDE * SIDE]
        return [self._nearest(pixels, ground, differs, part) for part in found]

    def _nearest(self, pixels: Array, ground: Array, differs: Array, part: Array) -> Found:
        left, top, right, bottom = box = box_of(part)
        piece, under = (_shrunk(values[top:bottom, left:right]) for values in (pixels, ground))
        solid = part & (differs >= np.median(differs[part]))  # its edges are mixed with the ground
        color = np.median(pixels[solid], axis=0).astype(np.float32)
        drawn = self._ink_NFF3 + self._clear_NFF1 * under
        drawn[self._inked] += (1 - self._clear_NFF1[self._inked]) * color  # black ink so far
        distances = np.square(drawn - piece).mean((1, 2, 3))
        distances += SHAPE_WEIGHT * np.square(self._aspect_N - np.log((right - left) / (bottom - top)))
        best = int(distances.argmin())
        place = tuple(value / SIDE for value in box)
        return Found(*self.names[best], nearest_color(color.tolist()), place, float(distances[best]))  # type: ignore[arg-type]


def _features(drawing: Image.Image) -> tuple[Array, Array, float]:
    """An RGBA drawing → its colours times opacity (F, F, 3), opacity (F, F, 1), logarithm of width over height of its box."""
    values = np.asarray(drawing, np.float32)
    left, top, right, bottom = box_of(values[..., 3] > 127)
    alpha = values[top:bottom, left:right, 3:] / 255
    return _shrunk(values[top:bottom, left:right, :3] * alpha), _shrunk(alpha), float(np.log((right - left) / (bottom - top)))


def _shrunk(values: Array) -> Array:
    """(h, w, C) → (F, F, C)."""
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((FEATURES, FEATURES), Image.Resampling.BILINEAR))
        for plane in np.moveaxis(values, -1, 0).astype(np.float32)
    ]
    return np.stack(planes, axis=-1)


def right(found: Sequence[Found], asked: dict[str, Any]) -> bool:
    """Whether what was found meets a line of GenEval's JSONL: counts, colours and places, as GenEval judges them."""
    by_class: list[list[Found]] = []
    for wanted in asked["include"]:
        these = [one for one in found if one.label == wanted["class"] and wanted.get("color") in (None, one.color)]
        if len(these) < wanted["count"]:
            return False
        by_class.append(these)
    for wanted, these in zip(asked["include"], by_class, strict=True):
        if "position" in wanted:
            relation, other = wanted["position"]
            if not any(stands(one, relation, reference) for one in these for reference in by_class[other]):
                return False
    unwanted = asked.get("exclude", [])
    return not any(sum(one.label == wanted["class"] for one in found) >= wanted["count"] for wanted in unwanted)


def stands(one: Found, relation: str, reference: Found) -> bool:
    """Whether `one` stands in that relation to `reference`: its centre lies that way by more than a tenth of both extents."""
    x, y = one.centre[0] - reference.centre[0], one.centre[1] - reference.centre[1]
    wide, high = (0.1 * sum(thing.box[i + 2] - thing.box[i] for thing in (one, reference)) for i in (0, 1))
    return {"left of": x < -wide, "right of": x > wide, "above": y < -high, "below": y > high}[relation]
