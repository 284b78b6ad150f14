"""`bitdance distill CONFIG --dry-run` of few evaluations: of a class model with the cost of this objective; of a model of prompts
the plan of its training with the teacher's second pass beside it, in which the teacher's path is not counted."""

import argparse
from typing import Any

import torch
from torch import Tensor

from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from bitdance.kinds.class_patch.settings import ClassSettings
from distill.few_steps_class import FewStepsObjective
from distill.few_steps_config import DistillClassConfig, FewStepsConfig
from stages.plan.command import plan_of_generator
from stages.plan.command import show as show_plan
from stages.plan.shape import Shape
from stages.recipes.class_patch.plan import ClassPatchSubject
from stages.recipes.pictures.feed import PictureBatch
from stages.recipes.pictures.plan import plan_of_pictures


def show(config: DistillClassConfig | FewStepsConfig, arguments: argparse.Namespace) -> int:
    """Print the plan."""
    if isinstance(config, FewStepsConfig):
        return show_plan(*plan_of_generator(config, arguments, Shape.of(config), None), config, arguments.json)
    plan: tuple[dict[str, Any], str] = plan_of_pictures(config, FewStepsSubject(config), arguments)
    return show_plan(*plan, config, arguments.json)


class FewStepsSubject(ClassPatchSubject):
    """See `pictures.plan.Subject`: the head alone trains, and the teacher's head solves its path."""

    def __init__(self, config: DistillClassConfig) -> None:
        super().__init__(config.class_patch)
        self.few = config.few_steps

    def loss_of(self, network: ClassPatchModel, B: int) -> Tensor:
        c = network.config
        objective = FewStepsObjective(network, torch.nn.Identity(), BinaryDiffusionHead(c.head), self.few, ClassSettings())
        bits_BChw = torch.ones(B, c.latent_dim, c.grid, c.grid)
        batch = PictureBatch(torch.zeros(B, dtype=torch.long), ClassNoise.draw(B, c, True), bits_BChw)
        return objective.rows(batch).mean()
