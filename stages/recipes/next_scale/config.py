"""The section [next_scale] of a training config, and the config that has it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from bitdance.kinds.next_scale.config import NextScaleConfig
from bitdance.kinds.next_scale.settings import SCHEDULES
from bitdance.values import RANGES, Range
from lfq_tokenizer import limits
from lfq_tokenizer.scale_vae import ScaleConfig
from lfq_tokenizer.scales import squares
from stages.config import TrainingConfig
from stages.recipes.pictures.config import PromptTraining
from stages.schema import Choice, Decay, Table

# What follows from tokenizer, data and text encoder.
DERIVED = ("condition", "tokens", "latents", "values", "num_classes", "text_width")
_WIDTH, _SIDES = Range(1, limits.WIDTH), tuple[Annotated[int, Range(1, limits.WIDTH)], ...]
MODEL = Table(
    {
        **dict.fromkeys(("width", "heads", "inner", "text_tokens"), _WIDTH),
        **dict.fromkeys(("levels", "flip_scales"), Range(0, limits.WIDTH)),
        **dict.fromkeys(("drop", "drop_path", "flips", "gate"), Range(0, 1, whole=False)),
        **dict.fromkeys(("shared_ada", "rotary"), bool),
        "depth": Range(1, limits.LAYERS),
        "sides": _SIDES,
    }
)
DEFAULTS = Table(
    {
        "guidance_scale": RANGES["guidance"],
        "tau": RANGES["tau"],
        "cfg_schedule": Choice(SCHEDULES),
        "top_k": Range(0, 1 << 24),
        "top_p": Range(0, 1, whole=False),
        "more_smooth": bool,
    }
)
VAE = Table(others=tuple(ScaleConfig.__dataclass_fields__))


@dataclass(frozen=True)
class NextScaleTraining(PromptTraining):
    """Cross-entropy of every scale's tokens from the scales before; see `PromptTraining`.

    The tokenizer is one of scales, on pictures, which are encoded on the way; without `model.sides` the scales are those that it
    was trained with. `reweighted`: a scale of few tokens counts for more
    (`scale_weights`). `vae` is the tokenizer's shape (fields of `ScaleConfig`) for a plan where it is not here.
    """

    SECTION = "next_scale"

    reweighted: bool = False
    smoothing: Decay = 0.0  # of labels
    vae: Annotated[Mapping[str, Any], VAE] = field(default_factory=dict)
    model: Annotated[Mapping[str, Any], MODEL] = field(default_factory=dict)
    defaults: Annotated[Mapping[str, Any], DEFAULTS] = field(default_factory=dict)  # of sampling; written to bitdance.json

    def shape(self, tokenizer: ScaleConfig, classes: int | None, text_width: int | None = None) -> NextScaleConfig:
        """The network's config for a tokenizer, and so many classes or features of a text token. ValueError names what is missing
        or does not fit."""
        if given := [name for name in DERIVED if name in self.model]:
            raise ValueError(f"next_scale.model names {', '.join(given)}, which follow from tokenizer and data; leave them out")
        codes = tokenizer.quantizer == "codes"
        derived: dict[str, Any] = {
            "condition": "class" if text_width is None else "text",
            "tokens": tokenizer.quantizer,
            "latents": tokenizer.latents if codes else tokenizer.bits,
            "values": tokenizer.codes if codes else 2,
            "num_classes": classes or 0,
            "text_width": text_width,
        }
        known = {"sides": tokenizer.sides} if tokenizer.sides else {}
        own = {"inner": 4 * self.model.get("width", 0), **known, **self.model}
        needed = [f.name for f in dataclasses.fields(NextScaleConfig) if f.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in {**own, **derived}]:
            raise ValueError(f"next_scale.model lacks {', '.join(missing)}; configs/imagenet/ has the published shapes")
        last, size = squares(own["sides"])[-1], self.size
        if tuple(tokenizer.downsampling * side for side in last) != (size, size):
            side, s = size // tokenizer.downsampling, tokenizer.downsampling
            raise ValueError(
                f"next_scale.model.sides end with {last[0]}×{last[1]} tokens of {s} pixels, next_scale.size = {size}; end them "
                f"with {side}, or change the size"
            )
        try:
            return NextScaleConfig(**own, **derived)
        except ValueError as error:
            raise ValueError(f"next_scale.model: {error}") from None


@dataclass(frozen=True)
class NextScaleTrainingConfig(TrainingConfig):
    """A training config of recipe 'next_scale'."""

    RECIPES: ClassVar[tuple[str, ...]] = ("next_scale",)

    next_scale: NextScaleTraining = field(default_factory=NextScaleTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.next_scale.check_tokenizer()
        self.data.refuse(self.recipe, "sources", "mix", "row_tokens", "crop")
