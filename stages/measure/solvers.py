"""What a solver with fewer steps loses, against the published procedure on the same model.

    bitdance measure solvers --model demo --train TAUGHT_SHARDS --heldout HELDOUT_SHARDS \\
        --try preset=balanced --try sampler=dpmpp_2m_sde,steps=6 --try steps=20,guidance_interval=0.3:1 [-o OUT]

*Right* (picture and background), *PSNR*: as `bitdance measure prompts` has them, for taught captions and held-out pairs. *Bits*:
the same captions with many seeds each give every bit a probability of being +1. Shown is the root of the mean squared difference
of these probabilities from the reference's, without the part that is chance (0 where chance explains more than there is), and
how many standard errors, over captions, it is away from none. *Variety*: the mean Hamming distance between two pictures of one
caption, as a share of the reference's. *Work*: rows of the head evaluated per picture, as a share of the reference's. The first
row is the reference once more with other seeds: what chance does.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdance.cli import Parser, count
from bitdance.costs.work import evaluations
from bitdance.heads.diffusion.settings import PRESETS, Sampling, choose
from bitdance.pipeline import BitDancePipeline
from lfq_tokenizer.files import write_text
from stages.engine.checkpoint import model_folder
from stages.measure.prompts import Gallery, follow, open_gallery

BATCH = 64
AGAIN = 1_000_000  # first seed of all settings: those of the reference's first time would make the same noise, and similar bits


def parse_setting(text: str) -> dict[str, Any]:
    """ "preset=balanced" or "sampler=heun,steps=5,guidance_interval=0.3:1,last_steps=3" → arguments of `choose`."""
    said: dict[str, Any] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            if name in ("preset", "sampler"):
                said[name] = value
            elif name in ("steps", "last_steps"):
                said[name] = int(value)
            elif name == "guidance":
                said[name] = float(value)
            elif name == "guidance_interval":
                low, high = value.split(":")
                said[name] = float(low), float(high)
            else:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--try {text!r}: {item!r} is none of preset=NAME, sampler=NAME, steps=N, last_steps=N, guidance=G, "
                "guidance_interval=LOW:HIGH"
            ) from None
    return said


def bits_of(pipe: BitDancePipeline, captions: Sequence[str], size: tuple[int, int], seeds: range, sampling: Sampling) -> Tensor:
    """Pictures of every caption with every seed → bits (captions, seeds, C·h·w) as bool."""
    found = []
    wanted = [(caption, seed) for caption in captions for seed in seeds]
    for start in range(0, len(wanted), BATCH):
        texts, numbers = zip(*wanted[start : start + BATCH], strict=True)
        bits_BChw = pipe(list(texts), *size, seed=list(numbers), output_type="bits", **sampling.arguments()).bits
        found.append(bits_BChw.flatten(1) > 0)
    return torch.cat(found).unflatten(0, (len(captions), len(seeds)))


def difference(a_KSN: Tensor, b_KSN: Tensor) -> tuple[float, float]:
    """Bits (K captions, S seeds, N bits) of two settings → root mean squared difference of their probabilities, without the part
    that is chance, and its distance from none in standard errors over captions."""
    p, q = a_KSN.double().mean(1), b_KSN.double().mean(1)
    chance = p * (1 - p) / (a_KSN.shape[1] - 1) + q * (1 - q) / (b_KSN.shape[1] - 1)
    squared_K = ((p - q).square() - chance).mean(1)
    mean, error = float(squared_K.mean()), float(squared_K.std() / math.sqrt(len(squared_K)))
    return math.sqrt(max(mean, 0.0)), mean / error if error else 0.0


def variety(bits_KSN: Tensor) -> float:
    """Mean share of bits in which two pictures of one caption differ."""
    p, S = bits_KSN.double().mean(1), bits_KSN.shape[1]
    return float((2 * p * (1 - p) * S / (S - 1)).mean())


def work(sampling: Sampling, blocks: int, time_shift: float) -> float:
    """Rows of the head that a picture takes, in units of one branch and one block."""
    return sum(sum(evaluations(sampling, steps, time_shift)) for steps in sampling.block_steps(blocks)) / blocks


def study(
    pipe: BitDancePipeline, gallery: Gallery, settings: dict[str, Sampling], a: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Figures by setting; the first is the reference, and is there twice."""
    generator = torch.Generator().manual_seed(a.seed)
    picks = torch.randperm(len(gallery.renderings), generator=generator)[: a.captions].tolist()
    captions = [gallery.renderings[i].captions[0] for i in picks]
    blocks = gallery.size[0] * gallery.size[1] // pipe.model.tokenizer.downsampling**2 // pipe.model.block_size  # type: ignore[union-attr]
    shift = pipe.model.head.config.time_shift
    reference = next(iter(settings.values()))
    reference_KSN = bits_of(pipe, captions, gallery.size, range(a.seeds), reference)
    figures: dict[str, dict[str, Any]] = {}
    for name, sampling in settings.items():
        begun = time.process_time()
        bits_KSN = bits_of(pipe, captions, gallery.size, range(AGAIN, AGAIN + a.seeds), sampling)
        seconds = (time.process_time() - begun) / (a.captions * a.seeds)
        followed, _ = follow(pipe, gallery, a.count, a.seed, **sampling.arguments())
        both = [followed[group] for group in ("taught", "heldout_pairs")]
        bias, errors = difference(bits_KSN, reference_KSN)
        figures[name] = {
            **asdict(sampling),
            "right": [row["rendering"] for row in both],
            "psnr": [row["psnr"] for row in both],
            "bits": bias,
            "standard_errors": errors,
            "variety": variety(bits_KSN) / variety(reference_KSN),
            "work": work(sampling, blocks, shift) / work(reference, blocks, shift),
            "cpu_seconds": seconds,
        }
        print(row(name, figures[name]), flush=True)
    return figures


COLUMNS = ("setting", "right: taught, held out", "PSNR", "bits differ by", "standard errors", "variety", "work", "CPU s/picture")
HEAD = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|"


def row(name: str, f: dict[str, Any]) -> str:
    """A line of the table."""
    right, psnr = ", ".join(f"{100 * v:.1f} %" for v in f["right"]), ", ".join(f"{v:.2f}" for v in f["psnr"])
    bits = f"{100 * f['bits']:.2f} % | {f['standard_errors']:+.1f} | {f['variety']:.3f}"
    return f"| {name} | {right} | {psnr} dB | {bits} | {f['work']:.3f} | {f['cpu_seconds']:.3f} |"


def main(argv: list[str]) -> int:
    """`bitdance measure solvers …`."""
    parser = Parser(prog="bitdance measure solvers", description="What fewer sampler steps cost.")
    parser.add_argument("--model", default="demo", help="model folder, or demo (default)")
    parser.add_argument("--train", nargs="+", required=True, help="shards of pictures the model was taught")
    parser.add_argument("--heldout", nargs="+", required=True, help="shards of picture × background pairs it never saw")
    parser.add_argument("--try", dest="settings", action="append", default=[], metavar="A=B,…", help="default: all presets")
    parser.add_argument("--count", type=count, default=200, help="prompts of each kind that are judged")
    parser.add_argument("--captions", type=count, default=24, help="captions for the bits' probabilities")
    parser.add_argument("--seeds", type=int, default=32, help="pictures of each of these")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts, and of the pictures (default: 0)")
    parser.add_argument("-o", "--output", type=Path, help="also write OUTPUT.md and OUTPUT.json")
    a = parser.parse_args(argv)
    if a.seeds < 2 or a.captions < 2:
        raise ValueError(f"--seeds {a.seeds} --captions {a.captions}; probabilities need at least 2 of each")
    pipe = BitDancePipeline.from_pretrained(model_folder(a.model))
    pipe.set_progress_bar_config(disable=True)
    defaults = {"guidance_scale": pipe.model.extras.get("defaults", {}).get("guidance_scale")}
    said = a.settings or [f"preset={name}" for name in PRESETS if name != "published"]
    settings = {"published": choose(defaults, "published")}
    settings |= {text: choose(defaults, **{"preset": "published", **parse_setting(text)}) for text in said}
    print(HEAD)
    figures = study(pipe, open_gallery(pipe, a.train, a.heldout), settings, a)
    if a.output:
        a.output.parent.mkdir(parents=True, exist_ok=True)
        write_text("\n".join([HEAD, *(row(name, f) for name, f in figures.items())]) + "\n", a.output.with_suffix(".md"))
        write_text(json.dumps(figures, indent=1) + "\n", a.output.with_suffix(".json"))
    mean = statistics.mean(f["cpu_seconds"] for f in figures.values())
    print(f"{len(figures)} settings, {mean:.2f} CPU seconds a picture on average, {torch.get_num_threads()} threads")
    return 0
