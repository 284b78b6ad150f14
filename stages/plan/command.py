"""`bitdance train CONFIG --dry-run`."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from stages.config import TrainingConfig, as_dict

if TYPE_CHECKING:
    from stages.plan.companion import Companion
    from stages.plan.shape import Shape


def show(
    config: TrainingConfig,
    arguments: argparse.Namespace,
    shape: "Shape | None" = None,
    companion: "Companion | None" = None,
) -> int:
    """Print the plan; for `shape` and `companion` see `make_plan`. ValueError where the config or the numbers given beside it
    cannot be."""
    plan, text = _tokenizer(config) if config.recipe == "tokenizer" else _generator(config, arguments, shape, companion)
    print(json.dumps({**plan, "config": as_dict(config)}, indent=2, default=str) if arguments.json else text)
    return 0


def _generator(
    config: TrainingConfig, arguments: argparse.Namespace, shape: "Shape | None", companion: "Companion | None"
) -> tuple[dict[str, Any], str]:
    from stages.plan import report
    from stages.plan.plan import Machine, make_plan

    numbers = arguments.processes.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"--processes {arguments.processes!r}: give numbers separated by commas, for example 64,8,512")
    processes = tuple(map(int, numbers))
    machine = Machine(processes, arguments.gpu_memory, arguments.peak_tflops, arguments.mfu)
    if arguments.caption_tokens < 1:
        raise ValueError(f"--caption-tokens {arguments.caption_tokens}: give at least 1")
    plan = make_plan(config, machine, arguments.caption_tokens, shape, companion)
    return plan.to_dict(), report.text(plan)


def _tokenizer(config: TrainingConfig) -> tuple[dict[str, Any], str]:
    """Everything is built and opened, so that what is missing is found here."""
    from stages.recipe import build_recipe

    recipe = build_recipe(config)
    networks = dict(recipe.module.named_children()) | ({"opponent": recipe.opponent.module} if recipe.opponent else {})
    parts = {name: {"all": _numbers(module), "trained": _numbers(module, trained=True)} for name, module in networks.items()}
    lines = [f"tokenizer: parameters{'':15}{'all':>18}{'trained':>18}"]
    lines += [f"  {name:34}{part['all']:>16,}{part['trained']:>18,}" for name, part in parts.items()]
    lines.append(f"the data: {recipe.length:,} samples; {recipe.hash[:16]}")
    return {"parameters": parts, "samples": recipe.length, "data": recipe.hash}, "\n".join(lines)


def _numbers(module: Any, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
