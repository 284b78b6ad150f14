"""What distillation costs and gains in quality: teacher and students side by side, with the same prompts and seeds.

    python -m distill.report --model teacher=demo --model data=runs/demo/distill-data … \\
        --train SHARDS --heldout SHARDS -o docs/distill/64 [--count 200] [--steps 20 10 5]

A model is a folder, a checkpoint or a run (its newest checkpoint), all of them with one picture tokenizer. Written are
`OUT.json`, `OUT.md` and `OUT.png` (a row for each model, a column for each prompt). For speed see `distill/speed.py`.

*Vision loss*: velocity loss on the held-out shards, first caption, no flips, fixed draws. A student sees later sub-patches in
noise where the teacher sees earlier ones as they are, so their losses have different floors. *Prompt following*: `bitdance
measure prompts`.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bitdance.folder.sizes import rule_of_model
from bitdance.picture import grid, write_png
from bitdance.pipeline import BitDancePipeline
from lfq_tokenizer.files import write_text
from stages.config import GeneratorTraining
from stages.data.buckets import Buckets
from stages.data.mixture import Mixture, Source
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.measure.prompts import follow, open_gallery
from stages.recipes.generator.documents import Documents
from stages.recipes.generator.objective import GeneratorObjective
from stages.recipes.generator.validation import heldout_losses

SEED = 100  # of the first picture of a row
COLUMNS = 12


def open_pipe(place: str, dtype: str = "float32") -> BitDancePipeline:
    """Of a folder, a checkpoint or a run."""
    pipe = BitDancePipeline.from_pretrained(model_folder(place), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vision_loss(pipe: BitDancePipeline, heldout: ShardDataset) -> float:
    """Of up to 256 held-out samples, four noise draws a block."""
    model = pipe.model
    assert model.tokenizer is not None
    rule = dataclasses.replace(rule_of_model(model), trained=())
    buckets, head = Buckets(rule, ()), dataclasses.replace(model.head.config, diff_batch_mul=4)
    training = GeneratorTraining(attention="dense")
    documents = Documents(model.text_tokenizer, model.special, model.tokenizer, head, buckets, training, 0, 1)
    return heldout_losses(GeneratorObjective(model, training), documents, Mixture([Source(heldout)], 0))["vision"]


def report(models: dict[str, str], a: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """All figures by model, and the pictures."""
    unseen = ShardDataset(ShardIndex.open(a.heldout))
    spread = range(0, len(unseen), max(1, len(unseen) // COLUMNS))
    prompts = [captions[0] for captions, _ in filter(None, (unseen.readable(unseen.caption, i) for i in spread))][:COLUMNS]
    shape = next(filter(None, (unseen.readable(unseen.shape, i) for i in range(len(unseen)))), None)
    if not prompts or shape is None:
        raise ValueError(f"--heldout {' '.join(a.heldout)}: no sample can be read; see `bitdance data inspect`")
    size = (shape.height, shape.width)
    gallery = open_gallery(open_pipe(next(iter(models.values()))), a.train, a.heldout)
    figures: dict[str, Any] = {}
    pictures: list[Image.Image] = []
    for name, place in models.items():
        pipe = open_pipe(place)
        unit = rule_of_model(pipe.model).unit
        row: dict[str, Any] = {
            "tokens_per_step": pipe.model.block_size,
            "ar_steps": size[0] * size[1] // unit**2,
            "guidance": pipe.model.extras.get("defaults", {}).get("guidance_scale"),
            "vision": vision_loss(pipe, unseen),
        }
        for steps in a.steps:
            found, _ = follow(pipe, gallery, a.count, 0, preset="published", num_inference_steps=steps)
            row[f"steps_{steps}"] = {kind: found[kind] for kind in ("taught", "heldout_pairs")}
        images = pipe(prompts, *size, preset="published", num_inference_steps=a.steps[0], seed=SEED).images
        assert isinstance(images, list)
        pictures += images
        figures[name] = row
        print(json.dumps({name: row}), flush=True)
    said = {"size": size, "prompts": prompts, "steps": a.steps, "models": figures}
    return said, grid(pictures, columns=len(prompts))


def table(said: dict[str, Any]) -> str:
    """The figures as Markdown: all of them at the first number of sampler steps, then what fewer steps leave."""
    models, steps = said["models"], said["steps"]
    lines = ["| model | tokens per step, AR steps | guidance | vision loss | taught: picture, background | held out | PSNR |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in models.items():
        taught, held = (row[f"steps_{steps[0]}"][kind] for kind in ("taught", "heldout_pairs"))
        shares = [f"{100 * part['picture']:.1f} %, {100 * part['background']:.1f} %" for part in (taught, held)]
        psnr = f"{taught['psnr']:.2f}, {held['psnr']:.2f} dB"
        shape = f"{row['tokens_per_step']}, {row['ar_steps']}"
        lines.append(f"| {name} | {shape} | {row['guidance']:g} | {row['vision']:.3f} | {shares[0]} | {shares[1]} | {psnr} |")
    if len(steps) > 1:
        lines += ["", f"| sampler steps | {' | '.join(map(str, steps))} |", "|---|" + "---|" * len(steps)]
        for name, row in models.items():
            cells = []
            for number in steps:
                taught, held = (row[f"steps_{number}"][kind] for kind in ("taught", "heldout_pairs"))
                cells.append(f"{100 * taught['rendering']:.1f} %, {100 * held['rendering']:.1f} %, {held['psnr']:.2f} dB")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", "Of each: picture and background both right, taught captions; the same of held-out pairs; PSNR of these."]
    return "\n".join(lines) + "\n"


def models_of(entries: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER → folder by name. ValueError where one has no name."""
    if wrong := [entry for entry in entries if "=" not in entry]:
        raise ValueError(f"--model {wrong[0]!r}: write NAME=FOLDER, for example teacher=demo")
    return dict(entry.split("=", 1) for entry in entries)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.report", description="Teacher and students side by side.")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--train", nargs="+", required=True, help="shards of pictures that were taught")
    parser.add_argument("--heldout", nargs="+", required=True, help="shards of pictures that were not")
    parser.add_argument("-o", "--output", type=Path, required=True, help="name of the files, without an ending")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="sampler steps per block")
    a = parser.parse_args(argv)
    said, pictures = report(models_of(a.model), a)
    a.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(said, indent=1) + "\n", a.output.with_suffix(".json"))
    write_text(table(said), a.output.with_suffix(".md"))
    write_png(pictures, a.output.with_suffix(".png"))
    print(table(said))


if __name__ == "__main__":
    main()
