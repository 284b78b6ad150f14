"""What distillation costs and gains: teacher and students side by side, with the same prompts and seeds.

    python -m distill.report --model teacher=demo --model data=runs/demo/distill-data … \\
        --train SHARDS --heldout SHARDS -o docs/distill [--count 200] [--steps 20 10 5] [--batch 1 16] [--dtype float32 bfloat16]

A model is a folder, a checkpoint or a run (its newest checkpoint); the first one is what speeds are compared with. Written are
`report.json`, `report.md` and `grid.png` (a row for each model, a column for each prompt).

*Vision loss*: velocity loss on the held-out shards, first caption, no flips, fixed draws. A student sees later sub-patches in
noise where the teacher sees earlier ones as they are, so their losses have different floors. *Prompt following*: `bitdance
measure prompts`. *Speed*: prompt to pixels, end to end, each model with its own guidance; the median of several runs.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bitdance.picture import grid
from bitdance.pipeline import BitDancePipeline
from bitdance.sizes import rule_of_model
from stages.checkpoint import model_folder
from stages.config import GeneratorTraining
from stages.data.buckets import Buckets
from stages.data.mixture import Mixture, Source
from stages.data.shards import ShardDataset, ShardIndex
from stages.generator.documents import Documents
from stages.generator.judging import heldout_losses
from stages.generator.objective import GeneratorObjective
from stages.measure.prompts import Gallery, follow, open_gallery

RUNS = 5  # of a timing
SEED = 100


def vision_loss(pipe: BitDancePipeline, heldout: Sequence[str]) -> float:
    """Of up to 256 held-out samples, four noise draws a block."""
    model = pipe.model
    assert model.tokenizer is not None
    rule = dataclasses.replace(rule_of_model(model), trained=())
    buckets, head = Buckets(rule, ()), dataclasses.replace(model.head.config, diff_batch_mul=4)
    mixture = Mixture([Source(ShardDataset(ShardIndex.open(list(heldout))))], 0)
    training = GeneratorTraining(attention="dense")
    documents = Documents(model.text_tokenizer, model.special, model.tokenizer, head, buckets, training, 0, 1)
    return heldout_losses(GeneratorObjective(model, training), documents, mixture)["vision"]


def images_per_second(pipe: BitDancePipeline, size: tuple[int, int], steps: int, prompts: Sequence[str]) -> float:
    """Prompts to PIL pictures, as one batch; the median of `RUNS` after one that warms up."""
    seconds = []
    for run in range(RUNS + 1):
        begun = time.perf_counter()
        pipe(list(prompts), *size, num_inference_steps=steps, seed=run)
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return len(prompts) / statistics.median(seconds[1:])


def report(models: dict[str, str], a: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """All figures by model, and the pictures."""
    figures: dict[str, Any] = {}
    pictures: list[Image.Image] = []
    unseen = ShardDataset(ShardIndex.open(list(a.heldout)))
    prompts = [unseen.caption(number)[0][0] for number in range(0, len(unseen), max(1, len(unseen) // 12))][:12]
    shape = unseen.shape(0)
    size = (shape.height, shape.width)
    gallery: Gallery | None = None  # one encoder made the bits of all models
    for name, place in models.items():
        folder = str(model_folder(place))
        pipe = _pipe(folder, "float32")
        defaults = pipe.model.extras.get("defaults", {})
        row: dict[str, Any] = {
            "tokens_per_step": pipe.model.block_size,
            "ar_steps": size[0] * size[1] // (pipe.model.block_size * rule_of_model(pipe.model).downsampling ** 2),
            "guidance": defaults.get("guidance_scale"),
            "vision": vision_loss(pipe, a.heldout),
        }
        for steps in a.steps:
            gallery = gallery or open_gallery(pipe, a.train, a.heldout)
            found, _ = follow(pipe, gallery, a.count, 0, num_inference_steps=steps)
            row[f"steps_{steps}"] = {kind: found[kind] for kind in ("taught", "heldout_pairs")}
        for dtype in a.dtype:
            timed = _pipe(folder, dtype)
            for batch in a.batch:
                for steps in a.steps:
                    asked = (prompts * batch)[:batch]
                    row[f"images_per_s/{dtype}/batch_{batch}/steps_{steps}"] = images_per_second(timed, size, steps, asked)
        images = pipe(prompts, *size, num_inference_steps=a.steps[0], seed=SEED).images
        assert isinstance(images, list)
        pictures += images
        figures[name] = row
        print(json.dumps({name: row}), flush=True)
    said = {"threads": torch.get_num_threads(), "size": size, "prompts": prompts, "steps": a.steps, "models": figures}
    return said, grid(pictures, columns=len(prompts))


def _pipe(folder: str, dtype: str) -> BitDancePipeline:
    pipe = BitDancePipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def table(said: dict[str, Any]) -> str:
    """The figures as Markdown: quality at the first number of steps, then speed."""
    models, steps = said["models"], said["steps"][0]
    lines = ["| model | tokens per step, AR steps | guidance | vision loss | taught: picture, background | held out | PSNR |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in models.items():
        taught, held = (row[f"steps_{steps}"][kind] for kind in ("taught", "heldout_pairs"))
        shares = [f"{100 * part['picture']:.1f} %, {100 * part['background']:.1f} %" for part in (taught, held)]
        psnr = f"{taught['psnr']:.2f}, {held['psnr']:.2f} dB"
        shape = f"{row['tokens_per_step']}, {row['ar_steps']}"
        lines.append(f"| {name} | {shape} | {row['guidance']:g} | {row['vision']:.3f} | {shares[0]} | {shares[1]} | {psnr} |")
    speeds = [key for key in next(iter(models.values())) if key.startswith("images_per_s/")]
    first = next(iter(models.values()))
    titles = [key.partition("/")[2].replace("/", ", ").replace("_", " ") for key in speeds]
    lines += ["", f"| images/s (times the first) | {' | '.join(titles)} |"]
    lines += ["|---|" + "---|" * len(speeds)]
    for name, row in models.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.2f} ({row[key] / first[key]:.2f}×)" for key in speeds) + " |")
    if len(said["steps"]) > 1:
        lines += ["", "| sampler steps | " + " | ".join(map(str, said["steps"])) + " |", "|---|" + "---|" * len(said["steps"])]
        for name, row in models.items():
            cells = []
            for number in said["steps"]:
                taught, held = (row[f"steps_{number}"][kind] for kind in ("taught", "heldout_pairs"))
                cells.append(f"{100 * taught['rendering']:.1f} %, {100 * held['rendering']:.1f} %, {held['psnr']:.2f} dB")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", "Of each: picture and background both right, taught captions; the same of held-out pairs; PSNR of these."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.report", description="Teacher and students side by side.")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="the first one is the teacher")
    parser.add_argument("--train", nargs="+", required=True, help="shards of pictures that were taught")
    parser.add_argument("--heldout", nargs="+", required=True, help="shards of pictures that were not")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="sampler steps per block")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes that are timed")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes that are timed")
    a = parser.parse_args(argv)
    models = dict(entry.split("=", 1) for entry in a.model)
    said, pictures = report(models, a)
    a.output.mkdir(parents=True, exist_ok=True)
    (a.output / "report.json").write_text(json.dumps(said, indent=1) + "\n")
    (a.output / "report.md").write_text(table(said))
    pictures.save(a.output / "grid.png")
    print(table(said))


if __name__ == "__main__":
    main()
