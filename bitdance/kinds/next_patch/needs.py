"""`bitdance doctor` of a text model: what a batch of pictures takes by part, whether it fits, and what it really took."""

import argparse
from typing import Any

import torch

from bitdance.bench.models import open_model
from bitdance.costs.memory import GB, BatchSpec, free_bytes, free_main_memory, needs, own_bytes
from bitdance.costs.shapes import SHAPES
from bitdance.folder.config import ModelConfig
from bitdance.networks.precision import DTYPES, resolve_dtype, usable_device
from bitdance.networks.quantize import check_quantization, quantize_model, speed_of, times_as_long
from bitdance.pipeline import BitDancePipeline

MEASURED_STEPS = 2  # the peak does not depend on their number


def needs_of_batch(options: argparse.Namespace) -> dict[str, Any]:
    """The needs of a batch, as JSON values. ValueError for what the model cannot do, and where nothing can be measured."""
    if options.shape is not None and options.shape not in SHAPES:
        raise ValueError(f"shape {options.shape!r}; known are {', '.join(SHAPES)}")
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
    if kinds := [kind for kind in dict.fromkeys(quantized.values()) if kind and device == "cpu"]:
        facts["speed"] = [speed_of(kind, dtype) for kind in kinds]
        facts["times_as_long"] = {kind: times_as_long(kind, DTYPES[dtype]) for kind in kinds}
    if options.measure:
        if not fits:
            raise ValueError(f"needs {found.peak / GB:.1f} GB, {(free or 0) / GB:.1f} GB free on {device}: nothing to measure")
        facts["measured_bytes"] = measure(model, spec, device)
    return facts


def measure(config: Any, spec: Any, device: str) -> int:
    """Bytes that a batch of `spec` took at most, the process included on a CPU. ValueError where the system does not say."""
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
        raise ValueError("this system does not say how much memory a process took (no /proc); --measure needs Linux on a CPU")
    return taken
