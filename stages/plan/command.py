"""`bitdance train CONFIG --dry-run`."""

import argparse
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bitdance.networks.precision import quick_dtype
from bitdance.values import Range
from stages.config import AUTO, TrainingConfig, as_dict
from stages.recipe import Recipe

if TYPE_CHECKING:
    from stages.plan.companion import Companion
    from stages.plan.plan import Machine
    from stages.plan.shape import Shape

PROCESSES, CAPTION, SIZE = Range(1, 10**6), Range(1, 10**6), Range(0, 10**9, whole=False, open_low=True)
FLAGS = {"memory": "--gpu-memory", "tflops": "--peak-tflops"}
CPU_MFU = 0.4


def show(plan: dict[str, Any], text: str, config: TrainingConfig, as_json: bool) -> int:
    """Print a plan, as JSON with the config beside it."""
    print(json.dumps({**plan, "config": as_dict(config)}, indent=2, default=str) if as_json else text)
    return 0


def plan_of_generator(
    config: TrainingConfig, arguments: argparse.Namespace, shape: "Shape | None" = None, companion: "Companion | None" = None
) -> tuple[dict[str, Any], str]:
    """For `shape` and `companion` see `make_plan`. ValueError where the config or the numbers given beside it cannot be."""
    from stages.plan import report
    from stages.plan.plan import make_plan

    caption = CAPTION.check("--caption-tokens", arguments.caption_tokens)
    described = (arguments.processes, arguments.gpu_memory, arguments.peak_tflops, arguments.mfu)
    if not torch.cuda.is_available() and all(value is None for value in described):
        # no GPU, and none described: this machine's processor, if the run has room in its memory
        plan = make_plan(_with_precision(config, quick_dtype("cpu")), processor(), caption, shape, companion)
        if plan.columns[0].fits:
            return {**plan.to_dict(), "device": "cpu"}, report.text(plan, here=True)
    plan = make_plan(_with_precision(config, "bfloat16"), gpus(arguments), caption, shape, companion)
    return {**plan.to_dict(), "device": "gpu"}, report.text(plan)


def _with_precision(config: TrainingConfig, quick: str) -> TrainingConfig:
    """The config with what "auto" means where the run is planned."""
    return replace(config, run=replace(config.run, precision=quick)) if config.run.precision == AUTO else config


def gpus(arguments: argparse.Namespace) -> "Machine":
    """What the options describe. ValueError for what is no number."""
    from stages.plan.plan import Machine

    numbers = (arguments.processes or "1").split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"--processes {arguments.processes!r}: give numbers separated by commas, for example 64,8,512")
    processes = tuple(PROCESSES.check("--processes", int(number.strip()[:20])) for number in numbers)
    said = {"memory": arguments.gpu_memory, "tflops": arguments.peak_tflops}
    known = {name: SIZE.check(FLAGS[name], value) for name, value in said.items() if value is not None}
    if arguments.mfu is not None:
        known["mfu"] = arguments.mfu
    return Machine(processes, **known)


def processor() -> "Machine":
    """One process on this machine: its memory, and the peak of its processor as measured now."""
    from stages.engine.step_metrics import peak_flops
    from stages.plan.plan import Machine

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine((1,), memory, peak_flops(torch.device("cpu"), quick_dtype("cpu")) / 1e12, CPU_MFU)


def plan_of_parts(recipe: Recipe) -> tuple[dict[str, Any], str]:
    """Parameters by part, and the data. Everything is built and opened, so that what is missing is found here."""
    networks = dict(recipe.module.named_children()) | (
        {"discriminator": recipe.discriminator.module} if recipe.discriminator else {}
    )
    parts = {name: {"all": _numbers(module), "trained": _numbers(module, trained=True)} for name, module in networks.items()}
    lines = [f"tokenizer: parameters{'':15}{'all':>18}{'trained':>18}"]
    lines += [f"  {name:34}{part['all']:>16,}{part['trained']:>18,}" for name, part in parts.items()]
    lines.append(f"the data: {recipe.feed.length:,} samples; {recipe.feed.hash[:16]}")
    return {"parameters": parts, "samples": recipe.feed.length, "data": recipe.feed.hash}, "\n".join(lines)


def _numbers(module: Any, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
