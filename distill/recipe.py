"""The recipe of distillation: a generator's, with a model that grew out of a teacher and the teacher beside it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bitdance.folder.checkpoint import load_model
from bitdance.folder.parts import HEAD_CONFIG
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.model import BitDanceModel
from bitdance.sequence.patches import patch_side
from distill.config import DistillConfig
from distill.documents import CachedLayout, TeacherLayout
from distill.fit import check_teacher
from distill.growth import check_sides, grow
from distill.objective import DistillObjective
from distill.targets import check_targets
from distill.teacher import Teacher, origin
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_config
from stages.data.mixture import Source
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.recipes.chain import check_chain
from stages.recipes.generator.documents import Documents
from stages.recipes.generator.feed import Layout
from stages.recipes.generator.recipe import GeneratorRecipe, fresh_model, open_sources, texts
from stages.recipes.generator.start import start_model, with_sides

PATHS = ("teacher", "samples", "device")  # of this machine


def build_recipe(config: DistillConfig) -> GeneratorRecipe:
    """What the engine trains. ValueError where teacher, student and config do not fit."""
    distill, folder = config.distill, model_folder(config.distill.teacher)
    T = read_config(folder / HEAD_CONFIG, HeadConfig.from_dict).parallel_num
    check_sides(patch_side(T), patch_side(config.block_size))
    sources = weighed_sources(config)
    student = fresh_model(config, lambda dtype: _student(config, folder, sources, dtype))
    teacher = Teacher.load(distill) if distill.objectives.teacher and not distill.cached else None
    lay_out: Layout = Documents.batch
    if teacher is not None:
        lay_out = TeacherLayout.of(teacher.model, distill.folded)
    elif distill.objectives.teacher:
        lay_out = CachedLayout(distill.guidance)
    return GeneratorRecipe(
        config,
        sources,
        student,
        DistillObjective(student, config.generator, distill, T, teacher),
        lay_out,
        beside=[] if teacher is None else [teacher.model] * (2 if distill.folded else 1),
        defaults={"guidance_scale": 1.0} if distill.folded else {},  # guidance that is folded in must not be added again
        card={"distill": {name: value for name, value in dataclasses.asdict(distill).items() if name not in PATHS}},
    )


def weighed_sources(config: DistillConfig) -> list[Source]:
    """Real pictures and the teacher's own, each as often as its objective weighs; with neither objective, real ones."""
    distill, weights, sources = config.distill, config.distill.objectives, []
    if weights.data or not weights.samples:
        real = open_sources(config.data)
        together = sum(source.weight for source in real)
        sources += [Source(source.data, (weights.data or 1.0) * source.weight / together) for source in real]
    if weights.samples:
        sources.append(Source(ShardDataset(ShardIndex.open(distill.samples)), weights.samples))
    if distill.cached:
        for source in sources:
            source.data.accept = check_targets  # a broken member costs its sample
    return sources


def _student(config: DistillConfig, teacher: Path, sources: Sequence[Source], dtype: torch.dtype) -> BitDanceModel:
    """The student: `generator.init`, or grown out of the teacher."""
    training, source = config.generator, f"distill.teacher = {config.distill.teacher!r}"
    if training.init:
        model = start_model(training, lambda: texts(sources, training), dtype)
        check_teacher(model, teacher, source)
        return model
    grown_from = load_model(teacher, device="cpu", dtype=torch.float32).train()
    model = grow(grown_from, patch_side(config.block_size), origin(config.distill))
    named = LFQTokenizer.from_pretrained(model_folder(training.tokenizer)).float() if training.tokenizer else None
    model.head.config = check_chain(model, training, named, source)
    if training.resolution_tokens > len(model.special.res_ids):
        model = with_sides(model, training.resolution_tokens)
    for part in (model.backbone, model.projector, model.head):
        part.to(dtype)
    return model
