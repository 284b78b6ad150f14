"""The section `[distill]` of a config; everything else is that of `bitdance train`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Annotated, ClassVar

import torch

from bitdance.networks.precision import AUTO, resolve_dtype
from bitdance.pipeline import DTYPES
from bitdance.values import RANGES
from stages.config import TrainingConfig, read_config
from stages.schema import Checked, Choice, StepsOrNone, Weight


@dataclass(frozen=True)
class Objectives(Checked):
    """Weights of the three terms of the loss (`distill/objective.py` derives them); 0 leaves a term out.

    data     the bits of real pictures: the paper's recipe, continued training with larger patches
    teacher  the teacher's prediction of the same noisy patch
    samples  the bits of pictures that the teacher made (`bitdance distill CONFIG --write-samples`)
    """

    SECTION = "distill.objectives"

    data: Weight = 1.0
    teacher: Weight = 0.0
    samples: Weight = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any((self.data, self.teacher, self.samples)):
            raise ValueError("distill.objectives: all weights are 0, so nothing is learned; give one of data, teacher, samples")


@dataclass(frozen=True)
class DistillTraining(Checked):
    """What is distilled, and how. The student predicts `generator.head.parallel_num` tokens per step. It grows out of the teacher
    or, with `generator.init`, goes on from a model that has grown already.
    """

    SECTION = "distill"

    teacher: str = ""  # a run, a checkpoint or a folder in the published layout
    objectives: Objectives = field(default_factory=Objectives)
    samples: tuple[str, ...] = ()  # shards of the teacher's own pictures
    cached: bool = False  # the shards hold what the teacher predicts (--write-targets): it is not loaded
    # folded into the student where it is above 1: of the teacher's predictions and of its pictures
    guidance: Annotated[float, RANGES["guidance"]] = 1.0
    fade: Weight = 1.0  # the teacher's term at time t counts (1 − t)^(fade · what the teacher does not see)
    fade_steps: StepsOrNone = 0  # the teacher's term falls linearly to nothing at this step; 0: it stays
    dtype: Annotated[str, Choice((AUTO, *DTYPES))] = AUTO  # of the teacher; auto: bfloat16 where it is quick, else float32
    device: str = ""  # of the teacher: "cpu", "cuda:1"; empty: that of the student
    offload: bool = False  # the teacher waits in main memory, and each layer visits the device for its own pass

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ValueError("distill.teacher is empty; name the model to distil: a run, a checkpoint or a model folder")
        if self.objectives.samples and not self.samples:
            raise ValueError(
                "distill.objectives.samples is given and distill.samples is empty; name the shards that "
                "`bitdance distill CONFIG --write-samples FOLDER` wrote"
            )
        if self.guidance > 1 and self.objectives.data:
            raise ValueError(
                f"distill.guidance = {self.guidance} folds guidance into the student, and real pictures (objectives.data = "
                f"{self.objectives.data}) teach it the opposite; set distill.guidance = 1 or distill.objectives.data = 0"
            )

    def torch_dtype(self, device: torch.device | str) -> torch.dtype:
        """The teacher's on `device`. Warns where that is bfloat16 and slow."""
        return DTYPES[resolve_dtype(self.dtype, device) or AUTO]

    @property
    def folded(self) -> bool:
        """Whether the student is to need no unconditional branch."""
        return self.guidance > 1


@dataclass(frozen=True)
class DistillConfig(TrainingConfig):
    RECIPES: ClassVar[tuple[str, ...]] = ("distill",)

    distill: DistillTraining = field(default_factory=DistillTraining)

    @property
    def block_size(self) -> int:
        """P, tokens per step of the student. ValueError where the config does not say it."""
        if "parallel_num" not in self.generator.head:
            raise ValueError("generator.head.parallel_num is missing: the student's tokens per step, for example 64")
        P = int(self.generator.head["parallel_num"])
        if isqrt(P) ** 2 != P:
            raise ValueError(f"generator.head.parallel_num = {P}; a patch is square: 4, 16, 36, 64, … tokens per step")
        return P


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> DistillConfig:
    """See `stages.config.read_config`."""
    return read_config(path, overrides, DistillConfig)
