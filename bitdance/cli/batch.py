"""The part of `bitdance doctor` about a batch of pictures: what it takes by part, whether it fits, and what it really took."""

import argparse
from typing import Any

from bitdance.cli import Parser, UsageError, number, print_json, print_page
from bitdance.cli.options import DTYPE_HELP, DTYPE_NAMES, QUANTIZE, QUANTIZE_HEAD
from bitdance.generator import module_of

GB = 1_000_000_000


def add_options(parser: Parser) -> None:
    """Add the options that describe a batch."""
    group = parser.add_argument_group("what a batch of pictures takes")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR|demo", help="the model in this folder")
    source.add_argument("--shape", metavar="NAME", help="of a published shape: 14b-64x, 14b-16x, or mid; no weights needed")
    group.add_argument("--height", type=number("height"), metavar="H", help="pixels; default: the model's")
    group.add_argument("--width", type=number("width"), metavar="W", help="pixels; default: the model's")
    group.add_argument("--batch-size", type=number("batch_size"), metavar="B", help="pictures at once (default: 1)")
    group.add_argument("--device", help="default: cuda where there is one, else cpu")
    group.add_argument("--dtype", choices=DTYPE_NAMES, help=DTYPE_HELP)
    group.add_argument("--guidance", type=number("guidance"), metavar="G", help="1 switches guidance off, which halves the cache")
    group.add_argument("--quantize", choices=QUANTIZE, help="LLM in 8 or 4 bits")
    group.add_argument("--quantize-head", choices=QUANTIZE_HEAD, help="head in 8 bits")
    group.add_argument(
        "--offload", action="store_true", help="keep the model in main memory, and on the device only what a phase needs"
    )
    group.add_argument("--measure", action="store_true", help="also make such a batch, and compare; a shape gets random weights")


def check_unused(options: argparse.Namespace) -> None:
    """UsageError for an option that describes a batch of no model."""
    for name, value in vars(options).items():
        if name != "json" and value not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} describes a batch; add --model DIR, --model demo or --shape NAME")


def show(options: argparse.Namespace) -> int:
    """Print the needs of a batch; exit code 1 when it does not fit."""
    facts = module_of(options.model or "demo").batch_needs(options)
    print_json(facts) if options.json else print_page(_text(facts).splitlines())
    return 0 if facts["fits"] else 1


def _text(facts: dict[str, Any]) -> str:
    size = f"{facts['height']}×{facts['width']} pixels, {facts['dtype']}, {'with' if facts['guided'] else 'without'} guidance"
    options = [f"{name} {facts[name]}" for name in ("quantize", "quantize_head") if facts.get(name)]
    options += ["offload"] if facts.get("offload") else []
    lines = [f"{facts['shape']}: {facts['batch']} × {size}{''.join(f', {o}' for o in options)}, on {facts['device']}"]
    phases = facts["phases"]
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    lines.append(f"{'GB':16}" + "".join(f"{name:>10}" for name in phases))
    for part in parts:
        lines.append(f"{part:16}" + "".join(f"{phase.get(part, 0) / GB:10.3f}" for phase in phases.values()))
    lines.append(f"{'all':16}" + "".join(f"{sum(phase.values()) / GB:10.3f}" for phase in phases.values()))
    free = "unknown" if facts["free_bytes"] is None else f"{facts['free_bytes'] / GB:.1f} GB"
    lines.append(f"needs about {facts['needs_bytes'] / GB:.2f} GB, free {free}: {'fits' if facts['fits'] else 'does not fit'}")
    if facts["main_memory_bytes"]:
        lines.append(f"and {facts['main_memory_bytes'] / GB:.1f} GB of main memory for the weights")
    lines += facts.get("speed", [])
    if "measured_bytes" in facts:
        measured = facts["measured_bytes"]
        lines.append(f"measured {measured / GB:.3f} GB (predicted {facts['needs_bytes'] / measured - 1:+.1%})")
    return "\n".join(lines)
