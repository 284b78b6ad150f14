"""`bitdance bench` of a refinement model."""

import argparse
from typing import Any

from bitdance.bench import OWN
from bitdance.bench import picture_model as bench
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.refine.pipeline import RefinePipeline
from bitdance.kinds.refine.settings import RefineSettings, choose


def measure_speed(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """See `bitdance.bench.picture_model`. ValueError for a sampler, which is another kind's."""
    if options.sampler:
        raise ValueError("--sampler is for kinds with a diffusion head; leave it out")
    return bench.measure_speed(options, RefinePipeline, _settings)


def _settings(model: PictureModel, preset: str, options: argparse.Namespace) -> RefineSettings:
    given = {"steps": options.steps, "guidance": options.guidance}
    return choose(model.defaults, None if preset == OWN else preset, **given)
