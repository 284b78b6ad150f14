"""`bitdance bench` of a text model: phases against the machine's own peak, from weights or from a published shape."""

import argparse
from typing import Any

import torch

from bitdance.bench import OWN
from bitdance.bench.report import shown
from bitdance.bench.study import Study
from bitdance.costs.peak import Peak
from bitdance.costs.shapes import SHAPES
from bitdance.folder.config import ModelConfig
from bitdance.heads.diffusion.settings import FEW_STEPS, Sampling, choose
from bitdance.networks.precision import resolve_dtype, usable_device


def measure_speed(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What was measured, or with --floor computed, as JSON values and for people. ValueError for what the model cannot do."""
    if options.shape is None:
        model = ModelConfig.of_folder(options.model or "demo")
    elif options.shape in SHAPES:
        model = SHAPES[options.shape]
    else:
        raise ValueError(f"shape = {options.shape!r:.80}; allowed are {', '.join(SHAPES)}")
    height, width = options.height or model.size[0], options.width or model.size[1]
    model.check_size(height, width)
    given = {"steps": options.steps, "guidance": options.guidance}
    own = choose(model.defaults, **given)
    # weights of a shape are random: they have been taught everything, guidance too, or nothing
    student = {"sampler": "direct", "guidance_scale": 1.0}
    taught = {name: student if options.shape and name in FEW_STEPS else {} for name in options.preset}
    presets = {
        name: choose({**model.defaults, **own}, None if name == OWN else name, **given, sampler=options.sampler)
        for name, own in taught.items()
    }
    device = torch.device(usable_device(options.device))
    asked = options.dtype or ["bfloat16" if options.floor else None]
    dtypes = asked if options.floor else list(dict.fromkeys(resolve_dtype(name, str(device)) for name in asked))
    study = Study(
        model,
        height,
        width,
        dtypes,
        options.batch,
        presets,
        Sampling(own.steps, own.guidance),
        options.quantize,
        options.quantize_head,
        False if options.no_compile else None,
    )
    if options.floor:
        found = study.roofline(Peak.parse(options.floor))
    else:
        if options.threads:
            torch.set_num_threads(options.threads)
        found = study.measure(device, options.repeats, options.yardstick)
    return found, shown(found)
