"""Few evaluations for a class-conditional model: what the engine trains, with the teacher's head beside it.

Only the head learns; the network that makes its conditions is the teacher's and stays as it is.
"""

import copy
import dataclasses

import torch
from torch import Tensor, nn

from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.settings import ClassSettings, choose
from distill.few_steps import drawn_guidance, ends, few_steps_loss, guided
from distill.few_steps_config import DistillClassConfig, FewSteps
from stages.recipe import Losses
from stages.recipes.class_patch.recipe import ClassPatchRecipe
from stages.recipes.frozen import Frozen
from stages.recipes.pictures.feed import PictureBatch
from stages.recipes.pictures.recipe import PictureObjective


class FewStepsObjective(PictureObjective):
    """Batch → the loss of `distill.few_steps`. `teacher`: the head as it was; `settings`: the guidance that is folded in."""

    loss_name = "end"

    def __init__(
        self, model: ClassPatchModel, tokenizer: nn.Module, teacher: BinaryDiffusionHead, few: FewSteps, settings: ClassSettings
    ) -> None:
        super().__init__(model, tokenizer)
        if few.range:
            model.config = dataclasses.replace(model.config, guidance_max=few.range[1])
            model.head.take_guidance(few.range[1])
        model.requires_grad_(False).head.requires_grad_(True)
        self.teacher, self.few = Frozen(teacher.eval().requires_grad_(False)), few
        M = model.config.num_blocks
        guidance = torch.tensor([max(1.0, sampling.guidance) for sampling, _ in settings.blocks(M)])
        self.register_buffer("guidance_M", guidance, persistent=False)
        self.guidance_M: Tensor

    def rows(self, batch: PictureBatch) -> Tensor:
        """Mean squares of each token (R,P)."""
        return self._rows(batch)[0]

    def forward(self, batch: PictureBatch, generator: torch.Generator, step: int) -> Losses:
        loss_RP, right = self._rows(batch)
        return loss_RP.mean(), {"right_at_start": right}, None

    def _rows(self, batch: PictureBatch) -> tuple[Tensor, Tensor]:
        """And the share of bits that one evaluation from noise has right."""
        bits_BChw, noise = batch.encoded(self.tokenizer.module), batch.noise
        shape = self.model.config
        bits_BNC = shape.plan.order(bits_BChw)
        seen_BNC = bits_BNC if noise.flipped_BNC is None else torch.where(noise.flipped_BNC, -bits_BNC, bits_BNC)
        with torch.no_grad():
            nothing = torch.full_like(batch.condition, self.model.null_class)
            cond_KPD, uncond_KPD = (
                self.model.conditions(seen_BNC, of).reshape(-1, shape.parallel_num, shape.dim).repeat(shape.diff_batch_mul, 1, 1)
                for of in (batch.condition, nothing)
            )
            # as an input it is taught from 1 on, so that it may rise over the blocks
            taught_K = drawn_guidance(noise.noise_KPC, 1.0, self.few.range[1]) if self.few.range else None
            guidance_K = self.guidance_M.repeat(len(bits_BNC) * shape.diff_batch_mul) if taught_K is None else taught_K
            teacher = guided(self.teacher.module, cond_KPD, uncond_KPD, guidance_K[:, None, None])
            end_KPC = ends(teacher, noise.noise_KPC, self.few.steps, shape.time_shift)
        return few_steps_loss(self.model.head, cond_KPD, noise.noise_KPC, end_KPC, noise.time_K, taught_K)


class FewStepsRecipe(ClassPatchRecipe):
    """A class model's recipe (see there) with this objective. ValueError where `class_patch.init` names no teacher, or one whose
    head is not diffusion."""

    def __init__(self, config: DistillClassConfig) -> None:
        super().__init__(config)
        objective, few = self.module, config.few_steps
        assert isinstance(objective, PictureObjective)
        if objective.model.config.head_kind != "diffusion":
            kind = objective.model.config.head_kind
            raise ValueError(
                f"class_patch.init = {config.class_patch.init!r} has head_kind = {kind!r}; only diffusion has a path"
            )
        own = choose(self.before.get("defaults", {}))
        if own.sampling.sampler == "direct":
            raise ValueError(
                f"class_patch.init = {config.class_patch.init!r} was distilled to few evaluations itself; name its teacher"
            )
        settings = ClassSettings(own.sampling.changed(guidance=few.folded(own.guidance)), few.cfg_schedule or own.cfg_schedule)
        self.module = FewStepsObjective(objective.model, self.tokenizer, copy.deepcopy(objective.model.head), few, settings)
        self._own = few.defaults(own.guidance) | ({"cfg_schedule": settings.cfg_schedule} if few.range else {})
        folded = {"guidance": few.range or settings.guidance, "cfg_schedule": settings.cfg_schedule}
        self.card = {"few_steps": {**dataclasses.asdict(few), **folded}}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Only the head trains."""
        return {"head": super().parts()["head"]}

    def defaults(self) -> dict[str, object]:
        """Guidance is in the weights, and one solver fits them."""
        return {**self.training.defaults, **self._own}
