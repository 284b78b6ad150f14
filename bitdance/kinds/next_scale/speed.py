"""`bitdance bench` of a next-scale model."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitdance.bench import OWN
from bitdance.bench import picture_model as bench
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.next_scale.generate import condition_of, own_draws
from bitdance.kinds.next_scale.pipeline import NextScalePipeline
from bitdance.kinds.next_scale.plain import generate_plain
from bitdance.kinds.next_scale.settings import NextScaleSettings, choose


def measure_speed(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """See `bitdance.bench.picture_model`. ValueError for a sampler and for steps, which are another kind's."""
    for name in ("sampler", "steps"):
        if getattr(options, name):
            raise ValueError(f"--{name} is for kinds whose steps can be chosen; leave it out")
    return bench.measure_speed(options, NextScalePipeline, _settings, _plainly)


def _plainly(
    pipe: NextScalePipeline,
    conditions: Sequence[Any],
    height: int,
    width: int,
    settings: NextScaleSettings,
    generators: Sequence[torch.Generator],
) -> list[Tensor]:
    network, quantizer = pipe.model.network, pipe.model.tokenizer.quantize
    with torch.no_grad():
        condition = condition_of(network, pipe.model.text, conditions, settings.guided)
    sides, draws = pipe.sides(height, width), own_draws(generators)
    return generate_plain(network, quantizer, condition, sides, settings, draws, len(conditions))


def _settings(model: PictureModel, preset: str, options: argparse.Namespace) -> NextScaleSettings:
    settings = choose(model.defaults, None if preset == OWN else preset, guidance=options.guidance)
    return settings.changed(steps=len(model.network.config.sides))
