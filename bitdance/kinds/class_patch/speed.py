"""`bitdance bench` of a class model: pictures per second and seconds by phase, against the operations that torch counts."""

import argparse
import io
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bitdance.bench import OWN
from bitdance.bench.report import table
from bitdance.costs.peak import measure_peak, wait
from bitdance.kinds.class_patch.costs import refuse
from bitdance.kinds.class_patch.folder import ClassModel, load
from bitdance.kinds.class_patch.generate import generate_bits
from bitdance.kinds.class_patch.pipeline import ClassPipeline
from bitdance.kinds.class_patch.settings import ClassSettings, choose
from bitdance.networks.precision import DTYPES, resolve_dtype, usable_device
from bitdance.picture import to_pil

PHASES = ("tokens", "decode", "png")
FOR_TEXT = ("height", "width", "quantize", "quantize_head", "no_compile", "yardstick", "floor")


def measure_speed(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Medians over rounds by dtype, preset and batch, as JSON values and for people. ValueError for options of text models."""
    refuse(options, *FOR_TEXT)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(usable_device(options.device))
    found: dict[str, Any] = {"model": options.model, "device": str(device), "torch": torch.__version__, "runs": []}
    found["threads"] = torch.get_num_threads()
    for dtype in dict.fromkeys(resolve_dtype(name, str(device)) for name in options.dtype or [None]):
        model, peak = load(Path(options.model), device, DTYPES[dtype], generation_only=True), measure_peak(device, DTYPES[dtype])
        presets = {name: _settings(model, name, options) for name in options.preset}
        flops = {
            name: operations(model, settings) for name, settings in presets.items()
        }  # before the pipeline changes the layers
        pipe = ClassPipeline(model)
        for name, settings in presets.items():
            for batch in options.batch:
                run = _run(pipe, settings, batch, options.repeats)
                computing = run["seconds"]["tokens"] + run["seconds"]["decode"]
                run |= {"flops": batch * flops[name], "share_of_peak": batch * flops[name] / computing / peak.flops_per_s}
                found["runs"].append({"dtype": dtype, "preset": name, **run})
    return found, _text(found)


def operations(model: ClassModel, settings: ClassSettings) -> float:
    """Floating point operations of one picture, counted by torch, which does not see those of oneDNN's packed layers."""
    with FlopCounterMode(display=False) as counter:
        bits_BChw = generate_bits(model.network, [0], settings, [torch.Generator().manual_seed(0)])
        model.tokenizer.decode(bits_BChw.to(next(model.tokenizer.decoder.parameters()).dtype))
    return float(counter.get_total_flops())


def _settings(model: ClassModel, preset: str, options: argparse.Namespace) -> ClassSettings:
    given = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    return choose(model.defaults, None if preset == OWN else preset, **given)


def _run(pipe: ClassPipeline, settings: ClassSettings, batch: int, repeats: int) -> dict[str, Any]:
    """A round to warm up, then the median of `repeats`."""
    _round(pipe, settings, batch)
    rounds = [_round(pipe, settings, batch) for _ in range(repeats)]
    seconds = {phase: statistics.median(spent[phase] for spent in rounds) for phase in PHASES}
    setting = {"batch": batch, "steps": settings.steps, "guidance": settings.guidance}
    return setting | {"images_per_s": batch / sum(seconds.values()), "seconds": seconds}


def _round(pipe: ClassPipeline, settings: ClassSettings, batch: int) -> dict[str, float]:
    """Seconds by phase of one batch, classes in turn, seeds from 0."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    classes = [seed % pipe.model.network.config.num_classes for seed in range(batch)]
    marks = [_now(pipe)]
    bits_BChw = pipe.generate(classes, pipe.model.side, pipe.model.side, settings, generators)
    marks.append(_now(pipe))
    images: Tensor = pipe.decode_tensor(bits_BChw, generators)
    marks.append(_now(pipe))
    for picture in to_pil(images):
        picture.save(io.BytesIO(), "PNG")
    marks.append(_now(pipe))
    return {phase: after - before for phase, before, after in zip(PHASES, marks, marks[1:])}


def _now(pipe: ClassPipeline) -> float:
    wait(pipe.device)
    return time.perf_counter()


def _text(found: dict[str, Any]) -> str:
    columns = ("", "batch", "images/s", *(f"{phase} s" for phase in PHASES), "GFLOP", "of peak")
    rows = []
    for run in found["runs"]:
        name = f"{run['dtype']}, {run['preset']}: {run['steps']} steps, guidance {run['guidance']:g}"
        seconds = [f"{run['seconds'][phase]:.3g}" for phase in PHASES]
        figures = [f"{run['images_per_s']:.4g}", *seconds, f"{run['flops'] / 1e9:.3g}", f"{100 * run['share_of_peak']:.1f} %"]
        rows.append([name, str(run["batch"]), *figures])
    machine = f"{found['device']}, {found['threads']} threads, torch {found['torch']}; seconds of the clock on the wall"
    return f"{found['model']}\n{machine}\n\n{table(columns, rows)}"
