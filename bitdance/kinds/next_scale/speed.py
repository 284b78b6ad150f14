"""`bitdance bench` of a next-scale model."""

import argparse
from typing import Any

from bitdance.bench import OWN
from bitdance.bench import picture_model as bench
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.next_scale.pipeline import NextScalePipeline
from bitdance.kinds.next_scale.settings import NextScaleSettings, choose


def measure_speed(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """See `bitdance.bench.picture_model`. ValueError for a sampler and for steps, which are another kind's."""
    for name in ("sampler", "steps"):
        if getattr(options, name):
            raise ValueError(f"--{name} is for kinds whose steps can be chosen; leave it out")
    return bench.measure_speed(options, NextScalePipeline, _settings)


def _settings(model: PictureModel, preset: str, options: argparse.Namespace) -> NextScaleSettings:
    settings = choose(model.defaults, None if preset == OWN else preset, guidance=options.guidance)
    return settings.changed(steps=len(model.network.config.sides))
