"""Few evaluations for a model of prompts: what the engine trains, with the teacher's head beside it.

Only the head learns, or with `[generator.lora]` an adapter to it; backbone and projector are the teacher's and stay as they
are. The conditions without the prompt come of the same pictures laid out once more (`distill/view.py`).
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.heads.diffusion.settings import choose
from bitdance.model import BitDanceModel
from distill.documents import DistillBatch, TeacherLayout
from distill.few_steps import drawn_guidance, ends, few_steps_loss, guided
from distill.few_steps_config import FewSteps, FewStepsConfig
from lfq_tokenizer.text import listed
from stages.config import GeneratorTraining
from stages.engine.processes import mean_over_processes
from stages.recipe import Losses
from stages.recipes.frozen import Frozen
from stages.recipes.generator.documents import GeneratorBatch
from stages.recipes.generator.lora import without_lora
from stages.recipes.generator.objective import GeneratorObjective
from stages.recipes.generator.recipe import GeneratorRecipe, fresh_model, open_sources, texts
from stages.recipes.generator.start import start_model
from stages.recipes.generator.validation import heldout_examples


class FewStepsTextObjective(GeneratorObjective):
    """Batch → the loss of `distill.few_steps`. `teacher`: the head as it was."""

    def __init__(
        self, model: BitDanceModel, training: GeneratorTraining, teacher: BinaryDiffusionHead, few: FewSteps, guidance: float
    ) -> None:
        super().__init__(model, training)
        self.teacher, self.few, self.guidance = Frozen(teacher.eval().requires_grad_(False)), few, guidance
        if few.range:
            model.head.take_guidance(few.range[1])

    def rows(self, batch: GeneratorBatch) -> tuple[Tensor, Tensor]:
        """Mean squares of each token (rows,P), and the share of bits that one evaluation from noise has right."""
        assert isinstance(batch, DistillBatch)
        sequence, attention = batch.sequence, self._attention(batch.sequence.ids_BL)
        if batch.pixels:
            sequence = batch.encoded(self.tokenizer.module.to(sequence.ids_BL.device), self.model.patch_side)
        noise, (view,) = sequence.noise, batch.views
        assert noise is not None
        S, _, P, _ = noise.noise_SMPC.shape
        with torch.no_grad():
            cond_MPD = self.model.conditions(sequence, attention)
            without_MPD = view.as_student(self.model.conditions(view.seen(sequence, flipped=True), attention), 1, P)
            cond_KPD, without_KPD = (part.repeat(S, 1, 1) for part in (cond_MPD, without_MPD))
            noise_KPC = noise.noise_SMPC.flatten(0, 1)
            taught_K = drawn_guidance(noise_KPC, *self.few.range) if self.few.range else None
            guidance_K = cond_KPD.new_full((1,), self.guidance, dtype=torch.float32) if taught_K is None else taught_K
            predict = guided(self.teacher.module, cond_KPD, without_KPD, guidance_K[:, None, None])
            end_KPC = ends(predict, noise_KPC, self.few.steps, self.model.head.config.time_shift)
        return few_steps_loss(self.model.head, cond_KPD, noise_KPC, end_KPC, noise.time_SM.flatten(), taught_K)

    def forward(self, batch: GeneratorBatch, generator: torch.Generator, step: int) -> Losses:
        self.seed_dropout(generator)
        loss_RP, right = self.rows(batch)
        own = torch.tensor(float(loss_RP.numel()), dtype=torch.float64, device=loss_RP.device)
        share = (own / mean_over_processes(own).clamp(min=1e-9)).to(loss_RP.dtype)  # as in `GeneratorObjective.forward`
        loss = loss_RP.mean() * share
        return loss, {"end": loss.detach(), "right_at_start": right}, None


class FewStepsTextRecipe(GeneratorRecipe):
    """A generator's recipe (see there) with this objective."""

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """The loss on up to 256 held-out samples, under noise that never changes."""
        if self.heldout is None:
            return {}
        assert isinstance(module, FewStepsTextObjective)
        batches = (self.feed.lay_out(self.documents, examples) for _, examples in heldout_examples(self.documents, self.heldout))
        found = [module.rows(batch.to(module.model.backbone.device))[0].flatten() for batch in batches]
        return {"end": float(torch.cat(found).mean())}


def build_recipe(config: FewStepsConfig) -> FewStepsTextRecipe:
    """What the engine trains. ValueError where teacher and config do not fit."""
    few, training, sources = config.few_steps, config.generator, open_sources(config.data)
    student = fresh_model(config, lambda dtype: start_model(training, lambda: texts(sources, training), dtype))
    known: dict[str, Any] = student.extras.get("defaults", {})
    own = choose(known)
    if own.sampler == "direct":
        raise ValueError(f"generator.init = {training.init!r} was distilled to few evaluations itself; name its teacher")
    if other := [name for name, p in student.named_parameters() if "lora_" in name and not name.startswith("head.")]:
        raise ValueError(
            f"generator.lora.targets = {list(training.lora.targets) if training.lora else []} reaches {listed(other)}; few "
            'evaluations are taught to the head alone: name layers of it, or leave targets out for ["head.net"]'
        )
    guidance = few.folded(own.guidance)
    both = TeacherLayout.of(student, True)
    layout = dataclasses.replace(both, texts=both.texts[1:])  # the prompts are in the student's own batch
    return FewStepsTextRecipe(
        config,
        sources,
        student,
        FewStepsTextObjective(student, training, without_lora(student.head), few, guidance),
        layout,
        beside=[student],
        defaults={"preset": "quick", **few.defaults(own.guidance)},
        card={"few_steps": {**dataclasses.asdict(few), "guidance": few.range or guidance}},
    )
