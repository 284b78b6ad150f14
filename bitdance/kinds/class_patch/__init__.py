"""Class-conditional next-patch diffusion: the ImageNet models of the BitDance paper. What it offers: see `bitdance.generator`."""

import argparse
from pathlib import Path
from typing import Any

from bitdance.kinds.class_patch.export import export
from bitdance.kinds.class_patch.facts import compare, examine, info
from bitdance.kinds.class_patch.folder import check_folder
from bitdance.kinds.class_patch.job_rules import JobRules as rules
from bitdance.kinds.class_patch.pipeline import ClassPipeline

load_pipeline = ClassPipeline.from_pretrained
__all__ = ["batch_needs", "bench", "compare", "examine", "export", "info", "load_pipeline", "rules", "sizes"]


def sizes(folder: Path) -> dict[str, Any]:
    """What `bitdance sizes` says of a model folder: the one size that it makes."""
    side = check_folder(folder).side
    one = {"default": (side, side), "sizes": [(side, side)], "only_these": True}
    return {**one, "multiple_of": side, "smallest_side": side, "largest_side": side}


def bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `bitdance bench` found, as JSON values and for people."""
    from bitdance.kinds.class_patch.speed import measure_speed

    return measure_speed(options)


def batch_needs(options: argparse.Namespace) -> dict[str, Any]:
    """What `bitdance doctor` says of a batch of pictures."""
    from bitdance.kinds.class_patch.costs import needs_of_batch

    return needs_of_batch(options)
