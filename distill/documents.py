"""What a step of distillation computes on: the student's batch, and beside it the teacher's view or what the teacher said before.

S noise draws per block, M blocks of all pictures, P tokens per block, C bits per token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.view import TeacherView
from stages.generator.documents import GeneratorBatch


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
