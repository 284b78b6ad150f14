"""`bitdance bench` of a model with one network: pictures per second and seconds by phase, against the operations that torch
counts."""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bitdance.bench.report import table
from bitdance.costs.peak import measure_peak, wait
from bitdance.costs.picture_model import refuse
from bitdance.folder.picture_model import PictureModel
from bitdance.networks.kernels import without_onednn
from bitdance.networks.precision import DTYPES, resolve_dtype, usable_device
from bitdance.picture import to_pil
from bitdance.picture_pipeline import PicturePipeline

PHASES = ("tokens", "decode", "png")
FOR_TEXT = ("height", "width", "quantize", "quantize_head", "no_compile", "yardstick", "floor")
# (model, preset, options) → settings with steps and guidance; (model, numbers of pictures) → what each is made of
Settings = Callable[[PictureModel, str, argparse.Namespace], Any]
# (pipeline, what pictures are made of, height, width, settings, generators): the same tokens by the published procedure
Plainly = Callable[[Any, Sequence[Any], int, int, Any, Sequence[torch.Generator]], Any]


def measure_speed(
    options: argparse.Namespace, pipeline: type[PicturePipeline], settings_of: Settings, plainly: Plainly | None = None
) -> tuple[dict[str, Any], str]:
    """Medians over rounds by dtype, preset and batch, as JSON values and for people. `plainly`: what `--yardstick` times in turn
    with ours. ValueError for options of text models."""
    refuse(options, *(name for name in FOR_TEXT if plainly is None or name != "yardstick"))
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(usable_device(options.device))
    found: dict[str, Any] = {"model": options.model, "device": str(device), "torch": torch.__version__, "runs": []}
    found["threads"] = torch.get_num_threads()
    for dtype in dict.fromkeys(resolve_dtype(name, str(device)) for name in options.dtype or [None]):
        peak = measure_peak(device, DTYPES[dtype])
        pipe = pipeline.from_pretrained(options.model, device, dtype, generation_only=True)
        presets = {name: settings_of(pipe.model, name, options) for name in options.preset}
        flops = {name: operations(pipe, settings) for name, settings in presets.items()}
        for name, settings in presets.items():
            for batch in options.batch:
                run = _run(pipe, settings, batch, options.repeats)
                if options.yardstick and plainly is not None:
                    run["yardstick"] = _yardstick(pipe, settings, batch, options.repeats, plainly)
                computing = run["seconds"]["tokens"] + run["seconds"]["decode"]
                run |= {"flops": batch * flops[name], "share_of_peak": batch * flops[name] / computing / peak.flops_per_s}
                found["runs"].append({"dtype": dtype, "preset": name, **run})
    return found, _text(found)


def operations(pipe: PicturePipeline, settings: Any) -> float:
    """Floating point operations of one picture, counted by torch, which does not see those of oneDNN's packed layers."""
    with without_onednn(pipe.model.network), FlopCounterMode(display=False) as counter:
        _round(pipe, settings, 1)
    return float(counter.get_total_flops())


def conditions(model: PictureModel, count: int) -> Sequence[Any]:
    """What so many pictures are made of: classes in turn, or one prompt."""
    if model.names is not None:
        return [number % len(model.names) for number in range(count)]
    return ["a red apple on a wooden table"] * count


def _run(pipe: PicturePipeline, settings: Any, batch: int, repeats: int) -> dict[str, Any]:
    """A round to warm up, then the median of `repeats`."""
    _round(pipe, settings, batch)
    rounds = [_round(pipe, settings, batch) for _ in range(repeats)]
    seconds = {phase: statistics.median(spent[phase] for spent in rounds) for phase in PHASES}
    setting = {"batch": batch, "steps": settings.steps, "guidance": settings.guidance}
    return setting | {"images_per_s": batch / sum(seconds.values()), "seconds": seconds}


def _yardstick(pipe: Any, settings: Any, batch: int, repeats: int, plainly: Plainly) -> dict[str, float]:
    """Seconds of processor time that the tokens take, by the plain procedure and by ours, in turn; medians of the rounds after
    the first."""
    height, width = pipe.model.sizes[0]
    spent: dict[str, list[float]] = {"plain": [], "ours": []}
    clock = time.process_time if pipe.device.type == "cpu" else time.perf_counter
    for _ in range(repeats + 1):
        for name, seconds in spent.items():
            generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
            wait(pipe.device)
            start = clock()
            if name == "plain":
                with without_onednn(pipe.model.network):
                    plainly(pipe, conditions(pipe.model, batch), height, width, settings, generators)
            else:
                pipe.generate(conditions(pipe.model, batch), height, width, settings, generators)
            wait(pipe.device)
            seconds.append(clock() - start)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}
    return {"seconds": medians["plain"], "ours": medians["ours"], "times_faster": medians["plain"] / medians["ours"]}


def _round(pipe: Any, settings: Any, batch: int) -> dict[str, float]:
    """Seconds by phase of one batch, seeds from 0."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    height, width = pipe.model.sizes[0]
    marks = [_now(pipe)]
    bits_BChw = pipe.generate(conditions(pipe.model, batch), height, width, settings, generators)
    marks.append(_now(pipe))
    images: Tensor = pipe.decode_tensor(bits_BChw, generators)
    marks.append(_now(pipe))
    for picture in to_pil(images):
        picture.save(io.BytesIO(), "PNG")
    marks.append(_now(pipe))
    return {phase: after - before for phase, before, after in zip(PHASES, marks, marks[1:])}


def _now(pipe: PicturePipeline) -> float:
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
    faster = [
        f"{run['dtype']}, batch {run['batch']}: tokens {run['yardstick']['times_faster']:.2f} times as fast as plainly"
        for run in found["runs"]
        if "yardstick" in run
    ]
    machine = f"{found['device']}, {found['threads']} threads, torch {found['torch']}; seconds of the clock on the wall"
    return "\n".join([f"{found['model']}\n{machine}\n\n{table(columns, rows)}", *faster])
