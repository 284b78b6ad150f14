"""The configs of distilling a model to few evaluations: those of its training, with a section `[few_steps]`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from bitdance.heads.diffusion.settings import guidance_range
from bitdance.kinds.class_patch.settings import SCHEDULES
from bitdance.values import Range
from stages.config import LoraTraining, TrainingConfig, read_config, read_values
from stages.recipes.class_patch.config import ClassTrainingConfig
from stages.schema import Checked, Choice, Steps


@dataclass(frozen=True)
class NumberOrRange(Range):
    """A guidance scale, or two, between which all are taught."""

    def check(self, name: str, value: Any, source: str = "") -> Any:
        if not isinstance(value, (list, tuple)):
            return super().check(name, value, source)
        try:
            return guidance_range(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@dataclass(frozen=True)
class FewSteps(Checked):
    """What is taught (`distill/few_steps.py`); the teacher is `class_patch.init` or `generator.init`."""

    SECTION = "few_steps"

    # folded in; 0: the teacher's default; two numbers: an input of the student, within this range
    guidance: Annotated[float | tuple[float, float], NumberOrRange(0, 1000, whole=False, hint="; or two, as a range")] = 0.0
    cfg_schedule: Annotated[str, Choice(("", *SCHEDULES))] = ""  # of the guidance; empty: the teacher's default
    steps: Steps = 8  # of the teacher's solver
    evaluations: Annotated[int, Range(1, 16)] = 2  # the default of the saved model

    @property
    def range(self) -> tuple[float, float] | None:
        """Of the guidance that is an input; None where one number is folded in."""
        return None if isinstance(self.guidance, (int, float)) else guidance_range(self.guidance)

    def folded(self, own: float) -> float:
        """The guidance that is folded in, or the default within the range; `own` is the teacher's default."""
        if isinstance(self.guidance, (int, float)):
            return max(1.0, self.guidance or own)
        low, high = guidance_range(self.guidance)
        return min(max(own, low), high)

    def defaults(self, own: float) -> dict[str, Any]:
        """How the saved model samples."""
        taught: dict[str, Any] = {"guidance_scale": 1.0}
        if self.range:
            taught = {"guidance_scale": self.folded(own), "guidance_range": list(self.range)}
        return {**taught, "sampler": "direct", "num_inference_steps": self.evaluations}


@dataclass(frozen=True)
class DistillClassConfig(ClassTrainingConfig):
    """A config of recipe 'few_steps_class'."""

    RECIPES: ClassVar[tuple[str, ...]] = ("few_steps_class",)

    few_steps: FewSteps = field(default_factory=FewSteps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.class_patch.init:
            raise ValueError("class_patch.init is empty; name the teacher: a run, a checkpoint or a model folder")


@dataclass(frozen=True)
class FewStepsConfig(TrainingConfig):
    """A config of recipe 'few_steps', of a model of prompts."""

    RECIPES: ClassVar[tuple[str, ...]] = ("few_steps",)

    few_steps: FewSteps = field(default_factory=FewSteps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.generator.init:
            raise ValueError("generator.init is empty; name the teacher: a run, a checkpoint or a model folder")
        # only the head learns, or an adapter to it, and nothing is taught of pictures without a prompt
        if lora := self.generator.lora:
            if self.few_steps.range:
                raise ValueError(
                    f"few_steps.guidance = {list(self.few_steps.range)} beside generator.lora: an adapter does not hold the "
                    "input for it; name one guidance, or leave the adapter out"
                )
            targets = ("head.net",) if lora.targets == LoraTraining().targets else lora.targets
            own = replace(self.generator, lora=replace(lora, targets=targets), dropout=0.0)
        else:
            own = replace(self.generator, freeze=("backbone", "projector"), dropout=0.0)
        object.__setattr__(self, "generator", own)
        if self.few_steps.cfg_schedule:
            said = f"few_steps.cfg_schedule = {self.few_steps.cfg_schedule!r}"
            raise ValueError(f"{said}: models of prompts have one guidance for all blocks; leave it out")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> DistillClassConfig | FewStepsConfig:
    """Of either kind; see `stages.config.read_config`."""
    if read_values(path, overrides).get("recipe") in DistillClassConfig.RECIPES:
        return read_config(path, overrides, DistillClassConfig)
    return read_config(path, overrides, FewStepsConfig)
