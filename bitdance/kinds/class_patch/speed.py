"""`bitdance bench` of a class model."""

import argparse
from typing import Any

from bitdance.bench import OWN
from bitdance.bench import picture_model as bench
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.class_patch.pipeline import ClassPipeline
from bitdance.kinds.class_patch.settings import ClassSettings, choose


def measure_speed(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """See `bitdance.bench.picture_model`."""
    return bench.measure_speed(options, ClassPipeline, _settings)


def _settings(model: PictureModel, preset: str, options: argparse.Namespace) -> ClassSettings:
    given = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    return choose(model.defaults, None if preset == OWN else preset, **given)
