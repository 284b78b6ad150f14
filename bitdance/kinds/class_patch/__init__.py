"""Class-conditional next-patch diffusion: the ImageNet models of the BitDance paper. What it offers: see `bitdance.generator`."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from bitdance.kinds.class_patch.costs import COSTS
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.kinds.class_patch.job_rules import JobRules as rules
from bitdance.kinds.class_patch.pipeline import ClassPipeline
from bitdance.verify import picture_model as facts

load_pipeline = ClassPipeline.from_pretrained
export = LAYOUT.export
examine, compare = partial(facts.examine, LAYOUT), partial(facts.compare, LAYOUT)
batch_needs = COSTS.needs_of_batch
__all__ = ["batch_needs", "bench", "compare", "examine", "export", "info", "load_pipeline", "rules", "sizes"]


def info(folder: Path) -> dict[str, Any]:
    """What `bitdance info` says of a model folder; no weights are loaded."""
    return {**facts.info(LAYOUT, folder), "tokens_per_step": LAYOUT.check(folder).config.parallel_num}


def sizes(folder: Path) -> dict[str, Any]:
    """What `bitdance sizes` says of a model folder: the one size that it makes."""
    (side, _) = LAYOUT.check(folder).sizes[0]
    one = {"default": (side, side), "sizes": [(side, side)], "only_these": True}
    return {**one, "multiple_of": side, "smallest_side": side, "largest_side": side}


def bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `bitdance bench` found, as JSON values and for people."""
    from bitdance.kinds.class_patch.speed import measure_speed

    return measure_speed(options)
