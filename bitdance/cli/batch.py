"""The part of `bitdance doctor` about a batch of pictures: what it takes by part, whether it fits, and what it really took."""

import argparse
from typing import Any

from bitdance.cli import Parser, UsageError, number, print_json, print_page
from bitdance.cli.options import DTYPE_HELP, DTYPE_NAMES, QUANTIZE, QUANTIZE_HEAD

GB = 1_000_000_000
MEASURED_STEPS = 2  # the peak does not depend on their number


def add_options(parser: Parser) -> None:
    """Add the options that describe a batch."""
    group = parser.add_argument_group("what a batch of pictures takes")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR|demo", help="of this model")
    source.add_argument("--shape", metavar="NAME", help="of a published shape: 14b-64x, 14b-16x, or mid; no weights needed")
    group.add_argument("--height", type=number("height"), metavar="H", help="pixels; default: the model's")
    group.add_argument("--width", type=number("width"), metavar="W", help="pixels; default: the model's")
    group.add_argument("--batch-size", type=number("batch_size"), metavar="B", help="pictures at once (default: 1)")
    group.add_argument("--device", help="default: cuda where there is one, else cpu")
    group.add_argument("--dtype", choices=DTYPE_NAMES, help=DTYPE_HELP)
    group.add_argument("--guidance", type=number("guidance"), metavar="G", help="1 switches guidance off, which halves the cache")
    group.add_argument("--quantize", choices=QUANTIZE, help="LLM in 8 or 4 bits")
    group.add_argument("--quantize-head", choices=QUANTIZE_HEAD, help="head in 8 bits")
    group.add_argument("--offload", action="store_true", help="model in main memory, on the device what a phase needs")
    group.add_argument("--measure", action="store_true", help="make such a batch too; a shape gets random weights")


def check_unused(options: argparse.Namespace) -> None:
    """UsageError for an option that describes a batch of no model."""
    for name, value in vars(options).items():
        if name != "json" and value not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} describes a batch; add --model DIR, --model demo or --shape NAME")


def show(options: argparse.Namespace) -> int:
    """Print the needs of a batch; exit code 1 when it does not fit."""
    from bitdance.costs.memory import BatchSpec, free_bytes, free_main_memory, needs, own_bytes
    from bitdance.costs.shapes import SHAPES
    from bitdance.folder.config import ModelConfig
    from bitdance.networks.precision import resolve_dtype, usable_device
    from bitdance.networks.quantize import check_quantization

    if options.shape is not None and options.shape not in SHAPES:
        raise UsageError(f"shape {options.shape!r}; known are {', '.join(SHAPES)}")
    model = SHAPES[options.shape] if options.shape else ModelConfig.of_folder(options.model)
    height, width = options.height or model.size[0], options.width or model.size[1]
    model.check_size(height, width)
    device = usable_device(options.device)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    dtype = resolve_dtype(options.dtype, device)
    if options.measure:
        check_quantization(options.quantize, options.quantize_head, device)
    quantized = {"quantize": options.quantize, "quantize_head": options.quantize_head}
    guided = options.guidance is None or options.guidance > 1
    spec = BatchSpec(height, width, options.batch_size or 1, dtype, kind, guided, **quantized, offload=options.offload)
    program, free = (own_bytes() or 0) if kind == "cpu" else 0, free_bytes(device)
    found, main = needs(model, spec, program), free_main_memory()
    fits = (free is None or found.peak - program <= free) and (main is None or found.main <= main)
    facts: dict[str, Any] = {
        "shape": model.name,
        **{name: value for name, value in vars(spec).items() if name != "device"},
        "device": device,
        "needs_bytes": found.peak,
        "main_memory_bytes": found.main,
        "phase": found.phase,
        "phases": found.phases,
        "free_bytes": free,
        "fits": fits,
    }
    if options.measure:
        if not fits:
            raise ValueError(f"needs {found.peak / GB:.1f} GB, {(free or 0) / GB:.1f} GB free on {device}: nothing to measure")
        facts["measured_bytes"] = measure(model, spec, device)
    print_json(facts) if options.json else print_page(_text(facts).splitlines())
    return 0 if fits else 1


def measure(config: Any, spec: Any, device: str) -> int:
    """Bytes that a batch of `spec` took at most, the process included on a CPU. UsageError where the system does not say."""
    import torch

    from bitdance.bench.models import open_model
    from bitdance.costs.memory import own_bytes
    from bitdance.networks.precision import DTYPES
    from bitdance.networks.quantize import quantize_model
    from bitdance.pipeline import BitDancePipeline

    dtype, kinds = DTYPES[spec.dtype], (spec.quantize, spec.quantize_head)
    home = "cpu" if spec.offload else device
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    model = open_model(config, home, dtype)
    if any(kinds):
        quantize_model(model, *kinds, home, dtype)
    pipe = BitDancePipeline(model)
    pipe.set_progress_bar_config(disable=True)
    if spec.offload:
        pipe.enable_model_cpu_offload(device)
    guidance = 7.5 if spec.guided else 1.0
    size = {"height": spec.height, "width": spec.width}
    prompts = ["a red apple on a wooden table, 3D style"] * spec.batch
    pipe(prompts, **size, num_inference_steps=MEASURED_STEPS, guidance_scale=guidance, seed=0)
    taken = torch.cuda.max_memory_allocated(device) if on_cuda else own_bytes(peak=True)
    if taken is None:
        raise UsageError("this system does not say how much memory a process took (no /proc); --measure needs Linux on a CPU")
    return taken


def _text(facts: dict[str, Any]) -> str:
    size = f"{facts['height']}×{facts['width']} pixels, {facts['dtype']}, {'with' if facts['guided'] else 'without'} guidance"
    options = [f"{name} {facts[name]}" for name in ("quantize", "quantize_head") if facts[name]]
    options += ["offload"] if facts["offload"] else []
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
    if "measured_bytes" in facts:
        measured = facts["measured_bytes"]
        lines.append(f"measured {measured / GB:.3f} GB (predicted {facts['needs_bytes'] / measured - 1:+.1%})")
    return "\n".join(lines)
