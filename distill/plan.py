"""`bitdance distill CONFIG --dry-run`: the plan of the student's training, with the teacher beside it."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from bitdance.folder.parts import HEAD_CONFIG
from bitdance.foreign import load_text_tokenizer
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.networks.precision import AUTO
from bitdance.pipeline import DTYPES
from bitdance.sequence.patches import patch_side
from bitdance.sequence.prompt import SpecialTokens, add_image_tokens
from distill.config import DistillConfig, DistillTraining
from distill.growth import check_sides
from lfq_tokenizer.json_file import read_config
from stages.config import GeneratorTraining, SourceConfig
from stages.plan.command import plan_of_generator
from stages.plan.command import show as show_plan
from stages.plan.companion import Companion
from stages.plan.shape import Shape, folder_here

ASSUMED = 16  # tokens per step of a teacher that is not here, as published


def show(config: DistillConfig, arguments: argparse.Namespace) -> int:
    """Print the plan. ValueError where the config, what is here of it, or the numbers given beside it do not fit."""
    student, teacher = shapes(config)
    config = _with_samples(config)
    return show_plan(*plan_of_generator(config, arguments, student, companion(config, teacher)), config, arguments.json)


def shapes(config: DistillConfig) -> tuple[Shape, Shape]:
    """Of the student and of the teacher. The student's is that of `generator.init` where it is here, else the grown teacher's
    where that is here, else what the config says; a teacher that is not here is the student with patches of 4 × 4 tokens.

    ValueError where patches do not divide, or a folder contradicts the config.
    """
    training, P, place = config.generator, config.block_size, config.distill.teacher
    source = f"distill.teacher = {place!r}"
    folder, goes_on = folder_here(place), folder_here(training.init) is not None
    if folder is None:
        student = Shape.of(config)
        absent = f"{source}, which is taken to predict {ASSUMED} tokens per step,"
        student = replace(student, absent=(absent, *student.absent))
        teacher = replace(student, head=replace(student.head, parallel_num=ASSUMED))
    else:
        T = read_config(folder / HEAD_CONFIG, HeadConfig.from_dict).parallel_num
        teacher = Shape.of_folder(folder, _with_block(training, T), source)
        student = Shape.of(config) if goes_on else _grown(teacher, folder, P)
        if training.init and not goes_on:
            student = replace(student, absent=(f"generator.init = {training.init!r}",))
    try:
        check_sides(patch_side(teacher.head.parallel_num), patch_side(P))
    except ValueError as error:
        raise ValueError(
            f"{error}; {source} is not here and taken to be of {ASSUMED}" if folder is None else str(error)
        ) from None
    return student, replace(teacher, head=replace(teacher.head, diff_batch_mul=student.head.diff_batch_mul))


def companion(config: DistillConfig, teacher: Shape) -> Companion | None:
    """The teacher as training runs it: until its term has faded, and not at all where its predictions are cached."""
    distill, steps = config.distill, config.run.steps
    if not distill.objectives.teacher or distill.cached:
        return None
    return Companion(
        "teacher",
        teacher,
        passes=2 if distill.folded else 1,
        steps=min(steps, distill.fade_steps or steps),
        dtype=DTYPES["bfloat16" if distill.dtype == AUTO else distill.dtype],
        place="host" if _device(distill) == "cpu" else "visits" if distill.offload else "gpu",
        remedy="distill.offload = true",
    )


def _device(distill: DistillTraining) -> str:
    """The kind of device that the teacher computes on; one that another machine has may be planned here."""
    try:
        return torch.device(distill.device or "cuda").type
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(f'distill.device = {distill.device!r} is none ({said}); give "cpu", "cuda:1" or nothing') from None


def _grown(teacher: Shape, folder: Path, P: int) -> Shape:
    """The shape of what `distill.growth.grow` makes of the teacher in `folder`."""
    tokenizer = load_text_tokenizer(folder)
    sides = len(SpecialTokens.from_tokenizer(tokenizer).res_ids)
    words = len(add_image_tokens(tokenizer, sides, P - 1))
    return replace(teacher, vocabulary=max(teacher.vocabulary, words), sides=sides, head=replace(teacher.head, parallel_num=P))


def _with_block(training: GeneratorTraining, T: int) -> GeneratorTraining:
    return replace(training, head={**training.head, "parallel_num": T})


def _with_samples(config: DistillConfig) -> DistillConfig:
    """The sources as `distill.recipe.weighed_sources` weighs them, written down as if they were those of the config."""
    weights, data = config.distill.objectives, config.data
    if not weights.samples:
        return config
    real = data.sources or (SourceConfig(data.train),)
    together = sum(source.weight for source in real)
    sources = [replace(source, weight=weights.data * source.weight / together) for source in real if weights.data]
    sources.append(SourceConfig(config.distill.samples, weights.samples))
    return replace(config, data=replace(data, train=(), sources=tuple(sources)))
