"""A student of few evaluations beside its teacher:

    bitdance measure few_steps --teacher demo --student runs/demo/few_steps --train TAUGHT_SHARDS --test HELDOUT_SHARDS -o OUT
    bitdance measure few_steps --teacher runs/cifar/class_1x --student runs/cifar/few_steps --train … --test … --each 100 -o OUT

A row for the teacher's own settings; then for each number of evaluations one for the teacher's solver (which takes two at least)
and one for the student. All make the same pictures: `--conditions` captions, or all classes, with `--each` seeds.

- *rows*: rows of the head for a block, counted; an evaluation with guidance takes two;
- *distance*: of EfficientNet-Lite0 features to those of real pictures: of the shards' renderings, of a class model the test
  pictures. It is not FID, and too high where pictures are few;
- *variety*: the mean distance in these features of two pictures of one condition; *bits apart*: the share of bits in which they
  differ; *bit entropy*: the mean entropy of a bit of one condition over the seeds, 1 where it is drawn like a coin;
- *right*: of a class model the share of pictures that a linear probe assigns to their class (`stages/measure/classes.py`), of a
  model of prompts the share of taught captions whose picture and background are right, *held out* the same of pairs that it never
  saw, and *PSNR* of the taught ones (`stages/measure/prompts.py`);
- *pictures/s*: from condition to pixels, by the processor's time with one thread on a CPU, else by the clock on the wall.

OUT gets few_steps.json, few_steps.md and few_steps.png, a line of pictures for each row, of the same conditions and seeds.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance.bench.report import table
from bitdance.cli import Parser, count
from bitdance.costs.peak import on_cpu_time
from bitdance.generator import load_pipeline
from bitdance.heads.diffusion.sampler import SAMPLERS
from bitdance.networks.precision import quick_dtype
from bitdance.picture import grid, to_uint8, write_png
from lfq_tokenizer.files import write_text
from lfq_tokenizer.json_file import write_json
from lfq_tokenizer.text import printable
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.measure import classes, prompts
from stages.measure.frechet import lite0_features
from stages.measure.solvers import variety as bits_apart

BATCH = 64
SOLVER = "dpmpp_2m"  # whose path is taught: distill/few_steps.py
SHOWN = 10  # pictures in a line of the grid


@dataclass(frozen=True)
class Way:
    """One way to make pictures: a pipeline with these settings."""

    name: str
    pipe: Any
    settings: dict[str, Any]


def ways(teacher: Any, student: Any, evaluations: Sequence[int], solver: str, guidance: float | None) -> list[Way]:
    """The rows of the report. `guidance` is the teacher's, and the student's where it takes that as an input."""
    given = {} if guidance is None else {"guidance_scale": guidance}
    chosen = given if student.model.extras.get("defaults", {}).get("guidance_range") else {}
    found = [Way("teacher, own settings", teacher, given)]
    for n in evaluations:
        if n > 1:
            found.append(Way(f"teacher, {solver}, {n}", teacher, {**given, "sampler": solver, "num_inference_steps": n - 1}))
        found.append(Way(f"student, {n}", student, {**chosen, "num_inference_steps": n}))
    return found


@dataclass(frozen=True)
class Made:
    """Pictures of K conditions with S seeds each: uint8 (K·S,H,W,3), bits (K,S,N), the rows of the head for a block, and how many
    pictures a second."""

    levels_NHW3: np.ndarray
    bits_KSN: Tensor
    rows: float
    per_second: float


def make(way: Way, conditions: Sequence[Any], each: int, seed: int, size: dict[str, int]) -> Made:
    """Seed k of every condition is `seed` + k. Settings that the model cannot take are a ValueError."""
    pipe, wanted = way.pipe, [(condition, seed + k) for condition in conditions for k in range(each)]
    head = getattr(pipe.model, "network", pipe.model).head
    rows, blocks, together = [], [], 0  # of all calls; blocks of all pictures; the pictures of a call

    def count(_: Any, given: tuple[Any, ...]) -> None:
        rows.append(len(given[2]))

    def done(*_: Any) -> None:
        blocks.append(together)

    clock = time.process_time if on_cpu_time(pipe.device) else time.perf_counter
    levels, bits, spent = [], [], 0.0
    hook = head.net.register_forward_pre_hook(count)
    try:
        for start in range(0, len(wanted), BATCH):
            some, seeds = zip(*wanted[start : start + BATCH], strict=True)
            named = {"prompt": list(some)} if pipe.names is None else {"class_label": list(some)}
            together, begun = len(some), clock()
            out = pipe(**named, seed=list(seeds), output_type="pt", callback_on_step_end=done, **size, **way.settings)
            spent += clock() - begun
            levels.append(to_uint8(2 * out.images - 1).cpu().numpy())
            bits.append(out.tokens.flatten(1).cpu() > 0)
    finally:
        hook.remove()
    bits_KSN = torch.cat(bits).unflatten(0, (len(conditions), each))
    return Made(np.concatenate(levels), bits_KSN, sum(rows) / sum(blocks), len(wanted) / spent)


def bit_entropy(bits_KSN: Tensor) -> float:
    """Mean entropy, in bits, of each bit of a condition over its seeds."""
    p_KN = bits_KSN.double().mean(1)
    terms = torch.special.entr(p_KN) + torch.special.entr(1 - p_KN)
    return float(terms.mean() / np.log(2))


class Prompts:
    """Judges models of prompts: what they were taught, and what they never saw."""

    columns = ("right", "held out", "PSNR")

    def __init__(self, teacher: Any, a: argparse.Namespace, features: Any) -> None:
        self.gallery, self.count, self.seed = prompts.open_gallery(teacher, a.train, a.test), a.count, a.seed
        order = torch.randperm(len(self.gallery.renderings), generator=torch.Generator().manual_seed(a.seed)).tolist()
        captions = dict.fromkeys(self.gallery.renderings[i].captions[0] for i in order)
        self.conditions = list(captions)[: a.conditions]
        self.size = dict(zip(("height", "width"), self.gallery.size, strict=True))
        self.real_NF = features(self.gallery.pixels_R3HW.permute(0, 2, 3, 1).contiguous().numpy())

    def __call__(self, way: Way, found_NF: Tensor) -> dict[str, float]:
        followed, _ = prompts.follow(way.pipe, self.gallery, self.count, self.seed, **way.settings)
        taught, held = followed["taught"], followed["heldout_pairs"]
        return {"right": taught["rendering"], "held out": held["rendering"], "PSNR": taught["psnr"]}


class Classes:
    """Judges class models by a probe that learned from real pictures."""

    columns = ("right",)

    def __init__(self, teacher: Any, a: argparse.Namespace, features: Any) -> None:
        names, (train, test) = teacher.names, (ShardDataset(ShardIndex.open(places)) for places in (a.train, a.test))
        known, real = (classes.real_pictures(data, names.number, min(a.probe, len(data)), a.seed) for data in (train, test))
        self.conditions, self.each = list(range(len(names))), a.each
        self.size: dict[str, int] = {}  # the one that it makes
        self.real_NF = features(real.levels_NHW3)
        self.probe = classes.Probe(features(known.levels_NHW3), known.class_N, len(names))

    def __call__(self, way: Way, found_NF: Tensor) -> dict[str, float]:
        class_N = torch.tensor(self.conditions).repeat_interleave(self.each)
        return {"right": float(self.probe.right(found_NF, class_N).float().mean())}


def measure(a: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """All figures as JSON values, and the grid; see the module."""
    teacher, student = (load_pipeline(model_folder(model), "cpu", a.dtype) for model in (a.teacher, a.student))
    for pipe in (teacher, student):
        pipe.set_progress_bar_config(disable=True)
    if student.model.extras.get("defaults", {}).get("sampler") != "direct":
        raise ValueError(f"--student {a.student} was not distilled to few evaluations; see docs/distill/few_steps.md")
    if teacher.kind != student.kind:
        raise ValueError(f"--teacher is a {teacher.kind} model, --student a {student.kind} model; name a teacher of that kind")
    Path(a.output, "features").mkdir(parents=True, exist_ok=True)
    features = classes.Features(lite0_features(), Path(a.output, "features"), quick_dtype("cpu"))
    judge = (Prompts if teacher.names is None else Classes)(teacher, a, features)
    rows, lines = [], []
    for way in ways(teacher, student, a.evaluations, a.solver, a.guidance):
        print(printable(way.name), file=sys.stderr, flush=True)
        made = make(way, judge.conditions, a.each, a.seed, judge.size)
        found_NF = features(made.levels_NHW3)
        of_N = torch.arange(len(judge.conditions)).repeat_interleave(a.each)
        row = {"name": way.name, "rows": made.rows, "distance": classes.distance(found_NF, judge.real_NF)}
        row |= {"variety": classes.variety(found_NF, of_N), "bits apart": bits_apart(made.bits_KSN)}
        row |= {"bit entropy": bit_entropy(made.bits_KSN), **judge(way, found_NF), "pictures/s": made.per_second}
        rows.append(row)
        lines += [Image.fromarray(levels) for levels in made.levels_NHW3[:: a.each][:SHOWN]]
    said = {name: value for name, value in vars(a).items() if name not in ("train", "test", "output", "json")}
    counts = {"conditions": len(judge.conditions), "pictures": len(judge.conditions) * a.each, "real": len(judge.real_NF)}
    found = {**said, **counts, "date": date.today().isoformat(), "threads": torch.get_num_threads(), "rows": rows}
    return found, grid(lines, columns=len(lines) // len(rows))


def text(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    names = [name for name in found["rows"][0] if name != "name"]
    shares = ("right", "held out", "bits apart")

    def cell(name: str, value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}" if name in shares else f"{value:.4g}"

    return table(["", *names], [[row["name"], *(cell(name, row[name]) for name in names)] for row in found["rows"]])


def main(argv: Sequence[str] | None = None) -> int:
    """`bitdance measure few_steps`; 0. ValueError and FileNotFoundError are the user's to mend."""
    parser = Parser(prog="bitdance measure few_steps", description="A student of few evaluations beside its teacher.")
    parser.add_argument("--teacher", required=True, help="a model folder, a run or a checkpoint")
    parser.add_argument("--student", required=True, help="what `bitdance distill` made of it: few_steps or few_steps_class")
    parser.add_argument("--train", nargs="+", required=True, metavar="SHARDS", help="pictures that the teacher was taught")
    parser.add_argument("--test", nargs="+", required=True, metavar="SHARDS", help="pictures, or pairs, that it never saw")
    parser.add_argument("--evaluations", type=count, nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    parser.add_argument("--solver", choices=SAMPLERS, default=SOLVER, help=f"of the teacher's rows (default: {SOLVER})")
    parser.add_argument("--guidance", type=float, help="the teacher's, and a student's that takes it (default: their own)")
    parser.add_argument("--conditions", type=count, default=32, help="captions; of a class model all classes (default: 32)")
    parser.add_argument("--each", type=int, default=16, help="seeds of each (default: 16)")
    parser.add_argument("--count", type=count, default=100, help="captions that are judged for right and PSNR (default: 100)")
    parser.add_argument("--probe", type=count, default=10_000, help="pictures of each set of classes, at most (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--dtype", default="float32", help="of the models: float32 (default), bfloat16, or auto")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder of the report")
    parser.add_argument("--json", action="store_true", help="print JSON")
    a = parser.parse_args(argv)
    if a.each < 2:
        raise ValueError(f"--each {a.each}: at least 2 seeds of each")
    found, lines = measure(a)
    print(json.dumps(found, indent=1) if a.json else text(found), flush=True)  # first: shown, also where it cannot be written
    write_json(found, Path(a.output, "few_steps.json"))
    write_text(text(found) + "\n", Path(a.output, "few_steps.md"))
    write_png(lines, Path(a.output, "few_steps.png"))
    return 0
