"""Recipe 'distill': that of a generator (`stages/generator/recipe.py`) which starts by growing and has a teacher beside it."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from bitdance.folder.checkpoint import load_model
from bitdance.folder.parts import HEAD_CONFIG
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.model import BitDanceModel
from distill.config import DistillConfig
from distill.documents import DistillBatch
from distill.fit import check_teacher
from distill.growth import check_sides, grow
from distill.objective import DistillObjective
from distill.targets import check_targets, joined, with_cached_draws
from distill.teacher import Teacher, origin
from distill.view import teacher_views
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_config
from stages.chain import check_chain
from stages.checkpoint import model_folder
from stages.data.mixture import Source
from stages.data.shards import ShardDataset, ShardIndex
from stages.generator.documents import Drawn, GeneratorBatch
from stages.generator.recipe import GeneratorRecipe, open_sources
from stages.generator.start import start_model, with_sides

PLACES = ("teacher", "samples", "device")  # of this machine


class DistillRecipe(GeneratorRecipe):
    """See `stages.recipe.Recipe`. ValueError where teacher, student and config do not fit."""

    def __init__(self, config: DistillConfig) -> None:
        self.distill, self.block_size = config.distill, config.block_size
        check_sides(isqrt(self.teacher_block_size), isqrt(self.block_size))
        super().__init__(config)

    @cached_property
    def teacher_folder(self) -> Path:
        return model_folder(self.distill.teacher)

    @cached_property
    def teacher_block_size(self) -> int:
        """Tokens per step of the teacher."""
        return read_config(self.teacher_folder / HEAD_CONFIG, HeadConfig.from_dict).parallel_num

    def open_sources(self) -> list[Source]:
        """Real pictures and the teacher's own stand in the row as often as their objectives weigh; with neither, real ones."""
        weights, sources = self.distill.objectives, []
        if weights.data or not weights.samples:
            real = open_sources(self.config.data)
            together = sum(source.weight for source in real)
            sources += [Source(source.data, (weights.data or 1.0) * source.weight / together) for source in real]
        if weights.samples:
            sources.append(Source(ShardDataset(ShardIndex.open(self.distill.samples)), weights.samples))
        if self.distill.cached:
            for source in sources:
                source.data.accept = check_targets  # a broken member costs its sample
        return sources

    def start(self, dtype: torch.dtype) -> BitDanceModel:
        """The student: grown out of the teacher, or `generator.init`."""
        training = self.training
        if training.init:
            model = start_model(training, self._texts, dtype)
            check_teacher(model, self.teacher_folder, f"distill.teacher = {self.distill.teacher!r}")
            return model
        teacher = load_model(self.teacher_folder, device="cpu", dtype=torch.float32).train()
        model = grow(teacher, isqrt(self.block_size), origin(self.distill))
        named = LFQTokenizer.from_pretrained(model_folder(training.tokenizer)).float() if training.tokenizer else None
        model.head.config = check_chain(model, training, named, f"distill.teacher = {self.distill.teacher!r}")
        if training.resolution_tokens > len(model.special.res_ids):
            model = with_sides(model, training.resolution_tokens)
        for part in (model.backbone, model.projector, model.head):
            part.to(dtype)
        return model

    def objective(self, model: BitDanceModel) -> DistillObjective:
        asked = self.distill.objectives.teacher and not self.distill.cached
        teacher = Teacher.load(self.distill) if asked else None
        return DistillObjective(model, self.training, self.distill, self.teacher_block_size, teacher)

    def lay_out(self, drawn: Sequence[Drawn]) -> GeneratorBatch:
        if not self.distill.objectives.teacher:
            return super().lay_out(drawn)
        if self.distill.cached:
            cached = [with_cached_draws(document, self.documents.head, self.distill.guidance) for document in drawn]
            batch = super().lay_out([document for document, _ in cached])
            return DistillBatch(batch.sequence, batch.pixels, [], joined([targets for _, targets in cached], batch.sequence))
        batch = super().lay_out(drawn)
        assert isinstance(self.module, DistillObjective)
        teacher = self.module.teacher.module.model
        views = teacher_views(drawn, batch.sequence, teacher, self.documents.packed, self.distill.folded)
        return DistillBatch(batch.sequence, batch.pixels, views)

    def defaults(self) -> dict[str, Any]:
        """Where guidance is folded into the student, none is to be added."""
        return super().defaults() | ({"guidance_scale": 1.0} if self.distill.folded else {})

    def settings(self) -> dict[str, Any]:
        distill = dataclasses.asdict(self.distill)
        return super().settings() | {"distill": {name: value for name, value in distill.items() if name not in PLACES}}

    def token_flops(self, model: BitDanceModel, encodes: bool = True) -> float:
        """With the passes of the teacher."""
        own = super().token_flops(model, encodes)
        assert isinstance(self.module, DistillObjective)
        teacher = self.module.teacher.module
        if teacher is None:
            return own
        return own + (2 if self.distill.folded else 1) * super().token_flops(teacher.model, encodes=False)
