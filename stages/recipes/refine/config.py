"""The section [refine] of a training config, and the config that has it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from bitdance.kinds.refine.config import ATTENTIONS, FORMS, ClassRefineConfig, RefineConfig, TextRefineConfig
from bitdance.kinds.refine.settings import PRESETS, SCHEDULES
from bitdance.kinds.refine.settings import RANGES as SAMPLING
from bitdance.values import RANGES, Range
from stages.config import TrainingConfig
from stages.recipes.pictures.config import PromptTraining
from stages.schema import Choice, Table

# What follows from tokenizer, data, size and text encoder.
DERIVED = ("bits", "num_classes", "grid", "grids", "text_width")
MODEL = Table(
    {
        **{name: allowed for kind in (ClassRefineConfig, TextRefineConfig) for name, allowed in kind.RANGES.items()},
        "labels": Choice(FORMS),
        "attention": Choice(ATTENTIONS),
    }
)
_ADAPTIVE = Table(
    {
        "warmup": Range(1, 10_000),
        "slope": Range(-1e6, 1e6, whole=False),
        "offset": Range(-1e6, 1e6, whole=False),
        "least": Range(1, 10_000),
    }
)
DEFAULTS = Table(
    {name: RANGES[name] for name in ("num_inference_steps", "guidance_scale")}
    | SAMPLING
    | {
        "schedule": Choice(SCHEDULES),
        "preset": Choice(tuple(PRESETS)),
        "guidance_interval": tuple[Annotated[float, RANGES["guidance_interval"]], ...],
        "adaptive": _ADAPTIVE,
    }
)


@dataclass(frozen=True)
class RefineTraining(PromptTraining):
    """Cross-entropy of all labels of partly random grids; see `PromptTraining`."""

    SECTION = "refine"

    model: Annotated[Mapping[str, Any], MODEL] = field(default_factory=dict)
    defaults: Annotated[Mapping[str, Any], DEFAULTS] = field(default_factory=dict)  # of sampling; written to bitdance.json

    def shape(self, bits: int, grid: int, classes: int | None, text_width: int | None = None) -> RefineConfig:
        """The network's config for a tokenizer of so many bits per token, a grid of `grid` × `grid` tokens, and so many classes
        or features of a text token. ValueError names what is missing or does not fit."""
        kind: type[RefineConfig] = TextRefineConfig if text_width is not None else ClassRefineConfig
        if given := [name for name in DERIVED if name in self.model]:
            raise ValueError(f"refine.model names {', '.join(given)}, which follow from tokenizer, data and size; leave them out")
        known = {f.name: f for f in dataclasses.fields(kind)}
        if odd := [name for name in self.model if name not in known]:
            raise ValueError(f"refine.model: {', '.join(odd)} are not of a {kind.condition}-conditional network")
        derived: dict[str, Any] = {"bits": bits}
        derived |= (
            {"num_classes": classes, "grid": grid} if text_width is None else {"text_width": text_width, "grids": ((grid, grid),)}
        )
        if missing := [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in {**self.model, **derived}]:
            raise ValueError(f"refine.model lacks {', '.join(missing)}; configs/imagenet/ has the published shapes")
        try:
            return kind(**self.model, **derived)
        except ValueError as error:
            raise ValueError(f"refine.model: {error}") from None


@dataclass(frozen=True)
class RefineTrainingConfig(TrainingConfig):
    """A training config of recipe 'refine'."""

    RECIPES: ClassVar[tuple[str, ...]] = ("refine",)

    refine: RefineTraining = field(default_factory=RefineTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refine.check_tokenizer()
        self.data.refuse(self.recipe, "sources", "mix", "row_tokens", "crop")
