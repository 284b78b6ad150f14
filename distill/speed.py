"""What distillation gains in speed: prompt to pixels, end to end, each model with its own guidance. Where one model's time goes
is for `bitdance bench` to say.

    OMP_NUM_THREADS=2 python -m distill.speed --model teacher=demo --model student=runs/demo/distill … \\
        [--size 64] [--steps 20] [--batch 1 4 16] [--dtype float32 bfloat16] [-o docs/distill/speed]

Images per second, the median of several runs after one that warms up, and how many times that is the first model's. Where
arithmetic sets the pace (a CPU, large batches) fewer and larger steps do the same work; where reading the weights or starting
kernels does, a quarter of the steps takes a quarter of the time.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from bitdance.bench.measure import pipeline, take_turns
from bitdance.heads.diffusion.settings import choose
from bitdance.pipeline import BitDancePipeline
from distill.report import models_of, open_pipe
from lfq_tokenizer.files import write_text

RUNS = 7
PROMPT = "a fox, 3D style, on a blue background"


def images_per_second(pipe: BitDancePipeline, side: int, steps: int, batch: int) -> float:
    """Of one batch after the other, without writing PNG files."""
    defaults = pipe.model.extras.get("defaults", {})
    contender = pipeline(pipe, choose(defaults, steps=steps), side, side, batch, PROMPT)
    take_turns([contender], RUNS)
    return batch / statistics.median(sum(run.values()) - run["png"] for run in contender.wall)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.speed", description="Images per second, end to end.")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="the first one is the yardstick")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps per block")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("-o", "--output", type=Path, help="also write OUTPUT.md and OUTPUT.json")
    a = parser.parse_args(argv)
    models = models_of(a.model)
    settings = [(dtype, batch) for dtype in a.dtype for batch in a.batch]
    found: dict[str, list[float]] = {}
    for name, place in models.items():
        pipes = {dtype: open_pipe(place, dtype) for dtype in a.dtype}
        found[name] = [images_per_second(pipes[dtype], a.size, a.steps, batch) for dtype, batch in settings]
    first = next(iter(found.values()))
    lines = ["| images/s | " + " | ".join(f"{dtype}, batch {batch}" for dtype, batch in settings) + " |"]
    lines += ["|---|" + "---|" * len(settings)]
    for name, speeds in found.items():
        cells = [f"{speed:.2f} ({speed / base:.2f}×)" for speed, base in zip(speeds, first, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if a.output:
        said = {"threads": torch.get_num_threads(), "size": a.size, "steps": a.steps, "settings": settings, "models": found}
        a.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(said, indent=1) + "\n", a.output.with_suffix(".json"))
        write_text("\n".join(lines) + "\n", a.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
