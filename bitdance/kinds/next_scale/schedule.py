"""Which scales a picture of prompts has: the published schedules of Infinity, by the ratio of height and width.

A schedule is cut after as many scales as the size asks for: 7 for about 0.06 megapixels, 10 for 0.25, 12 for 0.6, 13 for 1; 16
pixels per token of the last scale. Source: Infinity paper (arXiv 2412.04431); public code.
"""

from lfq_tokenizer.scales import Side

_TALL: dict[float, str] = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
_WIDE = {1.25: 0.8, 1.333: 0.75, 1.5: 0.666, 1.75: 0.571, 2.0: 0.5, 2.5: 0.4, 3.0: 0.333}
CUTS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}


def _read(text: str) -> tuple[Side, ...]:
    pairs = (part.split("x") for part in text.split())
    return tuple((int(h), int(w)) for h, w in pairs)


# ratio height / width → (height, width) in tokens of every scale
SCHEDULES: dict[float, tuple[Side, ...]] = {ratio: _read(text) for ratio, text in _TALL.items()}
SCHEDULES |= {_WIDE[ratio]: tuple((w, h) for h, w in sides) for ratio, sides in SCHEDULES.items() if ratio in _WIDE}


def ratio_of(side: Side) -> float:
    """The published ratio nearest to that of a grid (height, width)."""
    return min(SCHEDULES, key=lambda known: abs(known - side[0] / side[1]))


def schedule_of(side: Side) -> tuple[Side, ...]:
    """The scales of a picture whose last one is `side`. ValueError names the nearest that there are."""
    for sides in SCHEDULES.values():
        if side in sides[3:]:
            return sides[: sides.index(side) + 1]
    near = sorted((abs(h - side[0]) + abs(w - side[1]), (h, w)) for sides in SCHEDULES.values() for h, w in sides[3:])
    names = ", ".join(f"{16 * h}×{16 * w}" for _, (h, w) in near[:4])
    raise ValueError(f"{side[0]}×{side[1]} tokens are the last scale of no schedule; nearest are {names} pixels (height × width)")
