"""The section [class_patch] of a training config, and the config that has it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from bitdance.heads.diffusion.flow import SCHEDULES
from bitdance.kinds.class_patch.config import ATTENTIONS, HEADS, MODES, ClassPatchConfig
from bitdance.kinds.class_patch.settings import SCHEDULES as CFG_SCHEDULES
from bitdance.values import RANGES, Range
from lfq_tokenizer import limits
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig
from stages.config import TrainingConfig
from stages.recipes.pictures.config import PictureTraining
from stages.schema import Choice, Table

_WIDTH, _LAYERS = Range(1, limits.WIDTH), Range(1, limits.LAYERS)
# What the config says of the network; bits per token, classes and grid follow from the tokenizer, the data and the size.
MODEL = Table(
    {
        **dict.fromkeys(("dim", "n_head", "diff_dim", "cls_token_num", "diff_batch_mul"), _WIDTH),
        **dict.fromkeys(("n_layer", "diff_layers", "diff_adanln_layers"), _LAYERS),
        "parallel_num": Range(1, 65_536),
        "parallel_mode": Choice(MODES),
        "head_kind": Choice(HEADS),
        "attention": Choice(ATTENTIONS),
        **dict.fromkeys(("class_dropout_prob", "perturb_rate"), Range(0, 1, whole=False)),
        "P_mean": Range(-100, 100, whole=False),
        "P_std": Range(0, 100, whole=False, open_low=True),
        "time_schedule": Choice(tuple(SCHEDULES)),
        "time_shift": Range(0, 1000, whole=False, open_low=True),
    }
)
DEFAULTS = Table(
    {name: RANGES[name] for name in ("num_inference_steps", "guidance_scale")} | {"cfg_schedule": Choice(CFG_SCHEDULES)}
)


@dataclass(frozen=True)
class ClassPatchTraining(PictureTraining):
    """Velocity loss of the head on pictures of labelled classes; see `PictureTraining`."""

    SECTION = "class_patch"

    model: Annotated[Mapping[str, Any], MODEL] = field(default_factory=dict)
    defaults: Annotated[Mapping[str, Any], DEFAULTS] = field(default_factory=dict)  # of sampling; written to bitdance.json

    def shape(self, tokenizer: PictureTokenizerConfig, grid: int, classes: int) -> ClassPatchConfig:
        """The network's config for a tokenizer, a grid of `grid` × `grid` tokens and so many classes. ValueError names what is
        missing or does not fit."""
        width = tokenizer.bits or tokenizer.latents  # a tokenizer without bits makes numbers
        derived: dict[str, Any] = {"latent_dim": width, "grid": grid, "num_classes": classes, "numbers": not tokenizer.bits}
        required = [f.name for f in dataclasses.fields(ClassPatchConfig) if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in self.model]:
            raise ValueError(f"class_patch.model lacks {', '.join(missing)}; configs/imagenet/ has the published shapes")
        try:
            return ClassPatchConfig(**self.model, **derived)
        except ValueError as error:
            raise ValueError(f"class_patch.model: {error}") from None


@dataclass(frozen=True)
class ClassTrainingConfig(TrainingConfig):
    """A training config of recipe 'class_patch'."""

    RECIPES: ClassVar[tuple[str, ...]] = ("class_patch",)

    class_patch: ClassPatchTraining = field(default_factory=ClassPatchTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.class_patch.check_tokenizer()
        self.data.refuse(self.recipe, "sources", "mix", "row_tokens", "crop")
