"""The shape of a next-scale model, and the published sizes.

One transformer serves all: of classes (VAR) or of prompts (Infinity), for codes or for bits, with learned positions or rotary
ones. Sources: VAR paper (arXiv 2404.02905), Infinity paper (arXiv 2412.04431); published codes for the numbers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from bitdance.folder.json_config import config_from
from bitdance.values import Range, shown
from lfq_tokenizer import limits
from lfq_tokenizer.scales import Side, squares

CONDITIONS, TOKENS = ("class", "text"), ("codes", "bits")
_WIDTH, _LAYERS, _SHARE = Range(1, limits.WIDTH), Range(1, limits.LAYERS), Range(0, 1, whole=False)


@dataclass(frozen=True, kw_only=True)
class NextScaleConfig:
    """A transformer of `depth` blocks of `width` channels with `heads` attention heads, `inner` channels in a feed-forward
    network.

    `condition` "class" (of `num_classes`) or "text" (features of `text_width`, at most `text_tokens` of them; 0: none of either).
    `tokens` "codes" (one of `values` codes, `latents` numbers each) or "bits" (`latents` of them, `values` 2). `sides`
    (height, width) in tokens of every scale of the square picture it was trained with; other ratios follow from `schedule.py`
    where `rotary`. `shared_ada`: one modulation for all blocks, to which each adds its own table. `rotary`: rotary positions
    instead of learned ones. Training: `drop` share of conditions left out, `drop_path` of the last block, `flips` strength of
    bitwise self-correction in the first `flip_scales` scales, `gate` factor of the gates' first weights.
    """

    condition: str
    tokens: str
    width: int
    depth: int
    heads: int
    inner: int
    latents: int
    values: int
    sides: tuple[Side, ...]
    num_classes: int = 0
    text_width: int | None = None
    text_tokens: int = 512
    levels: int = 0  # rows of the table of scales; 0: as many as there are
    shared_ada: bool = False
    rotary: bool = False
    drop: float = 0.1
    drop_path: float = 0.1
    flips: float = 0.3
    flip_scales: int = 13
    gate: float = 1e-3

    def __post_init__(self) -> None:
        for name, value, words in (("condition", self.condition, CONDITIONS), ("tokens", self.tokens, TOKENS)):
            if not isinstance(value, str) or value not in words:
                raise ValueError(f"{name} = {shown(value)}; allowed are {', '.join(words)}")
        ranges = {
            **dict.fromkeys(("width", "heads", "inner", "latents", "values", "text_tokens"), _WIDTH),
            **dict.fromkeys(("num_classes", "levels", "flip_scales"), Range(0, limits.WIDTH)),
            **dict.fromkeys(("drop", "drop_path", "flips", "gate"), _SHARE),
            "depth": _LAYERS,
        }
        for name, allowed in ranges.items():
            object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width = {self.width} in heads = {self.heads}; a head's width must be a whole multiple of 4")
        if (self.condition == "text") != (self.text_width is not None) or (self.condition == "class") != bool(self.num_classes):
            said = f"condition = {self.condition!r}, text_width = {self.text_width}, num_classes = {self.num_classes}"
            raise ValueError(f"{said}; a model of text needs text_width, one of classes num_classes, and neither has the other")
        if not isinstance(self.sides, list | tuple) or not self.sides:
            raise ValueError(f"sides = {shown(self.sides)}; the side of every scale is needed, for instance [1, 2, 3, 4]")
        sides = squares(self.sides)
        if sides[0] != (1, 1):
            raise ValueError(f"sides = {shown(self.sides)}; the first scale is 1×1")
        object.__setattr__(self, "sides", tuple(sides))

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def bits(self) -> int:
        """Bits per token; of codes as many as tell them apart."""
        return max(1, (self.values - 1).bit_length()) if self.tokens == "codes" else self.latents

    @property
    def token(self) -> str:
        """What a token is."""
        if self.tokens == "codes":
            return f"one of {self.values} codes of {self.latents} numbers at every scale"
        return f"{self.latents} bits at every scale"

    @property
    def grids(self) -> tuple[Side, ...]:
        """The (height, width) in tokens of the last scale of what it makes by default."""
        return (self.sides[-1],)

    @property
    def class_count(self) -> int | None:
        """How many classes there are, without the one that stands for none; None: it makes pictures of prompts."""
        return self.num_classes or None

    @property
    def known(self) -> tuple[str, int] | None:
        """Name and parameters of the published model that this is, None for another shape or other classes."""
        training = {"drop", "drop_path", "flips", "flip_scales", "gate", "text_tokens"}
        mine = {name: value for name, value in self.to_dict().items() if name not in training}
        for name, config in PUBLISHED.items():
            if mine == {key: value for key, value in config.to_dict().items() if key not in training}:
                return name, COUNTS[name]
        return None

    @property
    def decides(self) -> dict[str, Any]:
        """What decides pictures and does not show in the shapes of the weights."""
        return {name: getattr(self, name) for name in ("heads", "sides", "tokens", "condition", "rotary")}

    @property
    def outputs(self) -> int:
        """Logits of a token."""
        return self.values if self.tokens == "codes" else 2 * self.latents

    @property
    def level_count(self) -> int:
        """Rows of the table of scales."""
        return self.levels or len(self.sides)

    @property
    def length(self) -> int:
        """L, tokens of all scales of the square picture."""
        return sum(h * w for h, w in self.sides)

    @classmethod
    def from_dict(cls, data: Any) -> "NextScaleConfig":
        """From a JSON object; an unknown or missing key is an error."""
        return config_from(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads."""
        return dataclasses.asdict(self)


VAR_256, VAR_512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
INFINITY_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


def var(depth: int, sides: tuple[int, ...] = VAR_256, shared_ada: bool = False) -> NextScaleConfig:
    """The published model of this depth."""
    return NextScaleConfig(
        condition="class",
        tokens="codes",
        width=64 * depth,
        depth=depth,
        heads=depth,
        inner=256 * depth,
        latents=32,
        values=4096,
        sides=sides,  # type: ignore[arg-type]
        num_classes=1000,
        shared_ada=shared_ada,
        drop_path=0.1 * depth / 24,
    )


def infinity(width: int, depth: int, heads: int, bits: int) -> NextScaleConfig:
    """The published model of this shape."""
    return NextScaleConfig(
        condition="text",
        tokens="bits",
        width=width,
        depth=depth,
        heads=heads,
        inner=256 * round(4 * width / 256),
        latents=bits,
        values=2,
        sides=INFINITY_1M,  # type: ignore[arg-type]
        text_width=2048,
        levels=15,
        shared_ada=True,
        rotary=True,
    )


COUNTS = {
    "VAR-d16": 310_283_520,
    "VAR-d20": 600_917_136,
    "VAR-d24": 1_033_399_360,
    "VAR-d30": 2_010_020_356,
    "VAR-d36-512": 2_353_893_904,
    "Infinity-125M": 125_148_800,
    "Infinity-layer16": 361_578_464,
    "Infinity-layer24": 940_871_072,
    "Infinity-2B": 2_204_564_032,
    "Infinity-layer32": 2_256_694_912,
    "Infinity-layer40": 4_716_421_888,
    "Infinity-layer48": 8_767_198_528,
    "Infinity-8B": 8_375_791_824,
}
PUBLISHED: dict[str, NextScaleConfig] = {
    "VAR-d16": var(16),
    "VAR-d20": var(20),
    "VAR-d24": var(24),
    "VAR-d30": var(30),
    "VAR-d36-512": var(36, VAR_512, shared_ada=True),
    "Infinity-125M": infinity(768, 12, 8, 16),
    "Infinity-layer16": infinity(1152, 16, 12, 16),
    "Infinity-layer24": infinity(1536, 24, 16, 16),
    "Infinity-2B": infinity(2048, 32, 16, 32),
    "Infinity-layer32": infinity(2080, 32, 20, 32),
    "Infinity-layer40": infinity(2688, 40, 24, 32),
    "Infinity-layer48": infinity(3360, 48, 28, 32),
    "Infinity-8B": infinity(3584, 40, 28, 56),
}
