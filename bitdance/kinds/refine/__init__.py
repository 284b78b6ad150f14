"""Refinement (GRN): all labels are predicted again and again, a random part is kept. What it offers: see `bitdance.generator`."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from bitdance.kinds.refine.costs import COSTS
from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.job_rules import JobRules as rules
from bitdance.kinds.refine.pipeline import RefinePipeline
from bitdance.verify import picture_model as facts

load_pipeline = RefinePipeline.from_pretrained
EDITS = ("mask", "strength", "extend", "source_prompt", "source_class", "whole", "tau")  # what `bitdance edit` may say
export = LAYOUT.export
info, examine, compare = partial(facts.info, LAYOUT), partial(facts.examine, LAYOUT), partial(facts.compare, LAYOUT)
batch_needs = COSTS.needs_of_batch
__all__ = [
    "EDITS",
    "batch_needs",
    "bench",
    "compare",
    "edit_settings",
    "examine",
    "export",
    "info",
    "load_pipeline",
    "rules",
    "sizes",
]


def sizes(folder: Path) -> dict[str, Any]:
    """What `bitdance sizes` says of a model folder: the one size of a class model, those that a model of prompts was trained
    with."""
    found = LAYOUT.check(folder)
    s, sides = found.tokenizer.downsampling, sorted({side for size in found.sizes for side in size})
    only = found.names is not None
    return {
        "default": found.sizes[0],
        "sizes": found.sizes,
        "only_these": only,
        "multiple_of": sides[0] if only else s,
        "smallest_side": sides[0] if only else s,
        "largest_side": sides[-1],
    }


def edit_settings(pipe: RefinePipeline, preset: str | None, said: dict[str, Any]) -> dict[str, Any]:
    """What an edited picture says of its settings: those that `pipe.edit` took for the same arguments."""
    settings = pipe.settings(preset, **said)
    return {"steps": settings.steps, "guidance": settings.guidance, **settings.words}


def bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `bitdance bench` found, as JSON values and for people."""
    from bitdance.kinds.refine.speed import measure_speed

    return measure_speed(options)
