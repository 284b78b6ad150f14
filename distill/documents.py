"""What a step of distillation computes on: the student's batch, and beside it the teacher's view or what the teacher said before.

S noise draws per block, M blocks of all pictures, P tokens per block, C bits per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitdance.model import BitDanceModel
from bitdance.sequence.batch import TrainingBatch
from bitdance.sequence.prompt import SpecialTokens, unconditional_ids
from distill.targets import joined, with_cached_noise
from distill.view import TeacherView, teacher_view
from stages.recipes.generator.documents import Documents, Example, GeneratorBatch


@dataclass
class DistillBatch(GeneratorBatch):
    """`views`: of the teacher, with the prompts, and with guidance once more without; empty where it is not asked.
    `targets` are its predictions at the draws of the batch, where they come with the data.
    """

    views: list[TeacherView] = field(default_factory=list)
    targets_SMPC: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "DistillBatch":
        own = super().to(device, non_blocking)
        targets = None if self.targets_SMPC is None else self.targets_SMPC.to(device, non_blocking=non_blocking)
        return DistillBatch(own.sequence, own.pixels, [view.to(device, non_blocking) for view in self.views], targets)

    def pin_memory(self) -> "DistillBatch":
        own = super().pin_memory()
        targets = None if self.targets_SMPC is None else self.targets_SMPC.pin_memory()
        return DistillBatch(own.sequence, own.pixels, [view.pin_memory() for view in self.views], targets)


@dataclass(frozen=True)
class TeacherLayout:
    """Lays examples out for the student and for a teacher of T tokens per block with its own `special` tokens. It has no weights.

    `texts` are what stands in the place of every prompt, one view for each; None keeps the prompts.
    """

    T: int
    special: SpecialTokens
    texts: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def of(cls, teacher: BitDanceModel, guided: bool) -> "TeacherLayout":
        """The layout for `teacher`: with the prompts and, where its predictions are to be guided, once more without."""
        dropped = (tuple(unconditional_ids(teacher.text_tokenizer)),) if guided else ()
        return cls(teacher.block_size, teacher.special, (None, *dropped))

    def views(self, examples: Sequence[Example], student: TrainingBatch, packed: dict[str, int]) -> list[TeacherView]:
        """The teacher's views of the examples of which `student` was made; see `teacher_view`."""
        return [teacher_view(examples, student, self.T, self.special, packed, text) for text in self.texts]

    def __call__(self, documents: Documents, examples: Sequence[Example]) -> DistillBatch:
        batch = documents.batch(examples)
        return DistillBatch(batch.sequence, batch.pixels, self.views(examples, batch.sequence, documents.packed))


@dataclass(frozen=True)
class CachedLayout:
    """Lays examples out beside the predictions that a teacher made of them earlier, with this guidance in them."""

    guidance: float

    def __call__(self, documents: Documents, examples: Sequence[Example]) -> DistillBatch:
        cached = [with_cached_noise(example, documents.head, self.guidance) for example in examples]
        batch = documents.batch([example for example, _ in cached])
        return DistillBatch(batch.sequence, batch.pixels, [], joined([targets for _, targets in cached], batch.sequence))
