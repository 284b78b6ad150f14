"""The shape of a refinement model, and the published sizes.

A token holds `bits` bits. A *label* is what the network predicts of it: one bit ("bit": as many labels as bits, two values
each), or all `rounds` bits of one latent at once ("ind": bits / rounds labels, 2^rounds values each).
Source: GRN paper (arXiv 2604.13030); published code for the numbers.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitdance.folder.json_config import config_from
from bitdance.values import Range, shown
from lfq_tokenizer import limits

FORMS = ("bit", "ind")
ATTENTIONS = ("prefix", "joint")
MOST_ROUNDS = 12  # bits of a latent; an index label has 2^12 values then
_WIDTH, _LAYERS, _SHARE = Range(1, limits.WIDTH), Range(1, limits.LAYERS), Range(0, 1, whole=False)
_REAL = Range(-100, 100, whole=False)


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """A transformer of `depth` blocks of `width` channels with `heads` attention heads over all tokens at once.

    `bits` per token, `rounds` of them per latent, `labels` "bit" or "ind".
    Training: `drop` share of pictures whose condition is left out; times sigmoid(P_std·n + P_mean) of a normal n, or uniform
    where P_std is 0; `time_shift` above 1 makes noisier pictures more frequent.
    """

    width: int
    depth: int
    heads: int
    bits: int
    rounds: int = 1
    labels: str = "bit"
    drop: float = 0.1
    P_mean: float = -0.8
    P_std: float = 0.8
    time_shift: float = 1.0

    condition: ClassVar[str]
    RANGES: ClassVar[dict[str, Range]] = {
        **dict.fromkeys(("width", "heads", "bits"), _WIDTH),
        "depth": _LAYERS,
        "rounds": Range(1, MOST_ROUNDS),
        "drop": _SHARE,
        "P_mean": _REAL,
        "P_std": Range(0, 100, whole=False),
        "time_shift": Range(0, 1000, whole=False, open_low=True),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"labels": FORMS}

    def __post_init__(self) -> None:
        for name, allowed in self.RANGES.items():
            object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
        for name, choices in self.CHOICES.items():
            if not isinstance(value := getattr(self, name), str) or value not in choices:
                raise ValueError(f"{name} = {shown(value)}; allowed are {', '.join(choices)}")
        if self.bits % self.rounds:
            raise ValueError(f"bits = {self.bits} are no multiple of rounds = {self.rounds}; a latent has one bit per round")
        if self.width % self.heads or self.head_width % 4:
            raise ValueError(
                f"width = {self.width} in heads = {self.heads}; a head's width must be a whole multiple of 4 "
                "(pairs of channels that turn by row and by column)"
            )

    @property
    def known(self) -> tuple[str, int] | None:
        """Name and parameters of the published model that this is, None for another shape or other classes."""
        return PUBLISHED_COUNTS.get(published_name(self) or "", {}).get((self.labels, self.class_count))

    @property
    def decides(self) -> dict[str, Any]:
        """What decides pictures and does not show in the shapes of the weights."""
        training = ("drop", "P_mean", "P_std", "time_shift", "grids")
        return {name: value for name, value in self.to_dict().items() if name not in training}

    @property
    def class_count(self) -> int | None:
        """How many classes there are, without the one that stands for none; None: it makes pictures of prompts."""
        raise NotImplementedError

    @property
    def token(self) -> str:
        """What a token is."""
        return f"{self.bits} bits"

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def label_count(self) -> int:
        """G, labels per token."""
        return self.bits if self.labels == "bit" else self.bits // self.rounds

    @property
    def values(self) -> int:
        """V, values of a label."""
        return 2 if self.labels == "bit" else 2**self.rounds

    @classmethod
    def from_dict(cls, data: Any) -> "RefineConfig":
        """From a JSON object, whose "condition" says which of the two networks it is; an unknown or missing key is an error."""
        if not isinstance(data, Mapping):
            raise ValueError(f"the config is a {type(data).__name__}; expected an object")
        kinds = {kind.condition: kind for kind in (ClassRefineConfig, TextRefineConfig)}
        condition = data.get("condition")
        if not isinstance(condition, str) or condition not in kinds:
            raise ValueError(f'"condition" = {shown(condition)}; allowed are {", ".join(kinds)}')
        kind, values = kinds[condition], {key: value for key, value in data.items() if key != "condition"}
        return config_from(kind, values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads."""
        return {"condition": self.condition, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ClassRefineConfig(RefineConfig):
    """Pictures of `num_classes` classes, of `grid` × `grid` tokens. Labels enter through `bottleneck` channels; from block
    `in_context_start` on, `in_context_len` tokens of the class stand before the picture's."""

    bottleneck: int = 128
    in_context_len: int = 32
    in_context_start: int = 4
    num_classes: int = 1000
    grid: int = 16

    condition = "class"
    text_width = None  # it reads no text
    RANGES: ClassVar[dict[str, Range]] = {
        **RefineConfig.RANGES,
        **dict.fromkeys(("bottleneck", "num_classes", "grid"), _WIDTH),
        "in_context_len": Range(0, limits.WIDTH),
        "in_context_start": Range(0, limits.LAYERS),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_context_len and self.in_context_start >= self.depth:
            raise ValueError(f"in_context_start = {self.in_context_start}; a block from 0 to {self.depth - 1} is allowed")

    @property
    def num_tokens(self) -> int:
        """N, tokens of a picture."""
        return self.grid**2

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The one (height, width) in tokens that it makes."""
        return ((self.grid, self.grid),)

    @property
    def class_count(self) -> int:
        """See `RefineConfig`."""
        return self.num_classes


@dataclass(frozen=True, kw_only=True)
class TextRefineConfig(RefineConfig):
    """Pictures of prompts, of any size: a text encoder gives `text_width` features per text token. With `attention` "prefix"
    the text attends to itself alone; with "joint" everything attends to everything.

    `sizes` are the (height, width) in tokens of a grid that the model was trained with, the first of them the default.
    """

    text_width: int
    mlp_ratio: float = 3.55
    attention: str = "prefix"
    grids: tuple[tuple[int, int], ...] = ((64, 64),)

    condition = "text"
    RANGES: ClassVar[dict[str, Range]] = {
        **RefineConfig.RANGES,
        "text_width": _WIDTH,
        "mlp_ratio": Range(0, 100, whole=False, open_low=True),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {**RefineConfig.CHOICES, "attention": ATTENTIONS}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width < 6:
            raise ValueError(f"width = {self.width} in heads = {self.heads}; a head's width must be at least 6")
        pairs = [tuple(pair) if isinstance(pair, list | tuple) else (0,) for pair in self.grids or [0]]
        if any(len(pair) != 2 or not all(_WIDTH.number(side) for side in pair) for pair in pairs):
            raise ValueError(f"grids = {shown(self.grids)}; pairs of (height, width) in tokens are allowed")
        object.__setattr__(self, "grids", tuple(pairs))

    @property
    def class_count(self) -> None:
        """See `RefineConfig`."""
        return None

    @property
    def inner(self) -> int:
        """Channels inside a block's feed-forward network."""
        return 256 * max(1, round(self.width * self.mlp_ratio / 256))


def _published(width: int, depth: int, heads: int, bottleneck: int, start: int) -> ClassRefineConfig:
    return ClassRefineConfig(
        width=width,
        depth=depth,
        heads=heads,
        bits=64,
        rounds=4,
        labels="ind",
        bottleneck=bottleneck,
        in_context_start=start,
    )


# The published shapes of 256×256 pixels with index labels; each serves bit labels too.
PUBLISHED: dict[str, ClassRefineConfig] = {
    "B": _published(768, 12, 12, 128, 4),
    "L": _published(1024, 24, 16, 128, 8),
    "H": _published(1280, 32, 16, 256, 10),
    "G": _published(1664, 40, 16, 256, 10),
}
PUBLISHED_TEXT = TextRefineConfig(width=2304, depth=28, heads=18, bits=256, rounds=4, text_width=4096, P_mean=-1.3, P_std=1.3)
# published name → (labels, classes) → (name, parameters), the stored table of positions included
PUBLISHED_COUNTS: dict[str, dict[tuple[str, int | None], tuple[str, int]]] = {
    "GRN-B": {("ind", 1000): ("GRN-ind-B", 130_861_056), ("bit", 1000): ("GRN-bit-B", 130_746_240)},
    "GRN-L": {("ind", 1000): ("GRN-ind-L", 458_549_472), ("bit", 1000): ("GRN-bit-L", 458_401_888)},
    "GRN-H": {("ind", 1000): ("GRN-ind-H", 952_055_104), ("bit", 1000): ("GRN-bit-H", 951_858_368)},
    "GRN-G": {("ind", 1000): ("GRN-ind-G", 2_006_572_432), ("bit", 1000): ("GRN-bit-G", 2_006_326_544)},
    "GRN-T2I-2B": {("bit", None): ("GRN-T2I-2B", 2_197_832_448)},
}
_SHAPE = ("width", "depth", "heads", "bottleneck", "in_context_len", "in_context_start", "bits", "rounds")


def published_name(config: RefineConfig) -> str | None:
    """The published model of this shape, None where there is none. Classes, labels and grids may be others."""
    if isinstance(config, ClassRefineConfig):
        shape = [getattr(config, name) for name in _SHAPE]
        return next((f"GRN-{name}" for name, known in PUBLISHED.items() if [getattr(known, n) for n in _SHAPE] == shape), None)
    shape = [getattr(config, name) for name in ("width", "depth", "heads", "bits", "rounds", "text_width")]
    known = [getattr(PUBLISHED_TEXT, name) for name in ("width", "depth", "heads", "bits", "rounds", "text_width")]
    return "GRN-T2I-2B" if shape == known else None
