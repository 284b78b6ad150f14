"""Next-scale prediction (VAR, Infinity): coarse to fine, a scale at once. What it offers: see `bitdance.generator`."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from bitdance.kinds.next_scale.costs import COSTS
from bitdance.kinds.next_scale.folder import LAYOUT
from bitdance.kinds.next_scale.job_rules import JobRules as rules
from bitdance.kinds.next_scale.pipeline import NextScalePipeline
from bitdance.kinds.next_scale.schedule import SCHEDULES
from bitdance.verify import picture_model as facts

load_pipeline = NextScalePipeline.from_pretrained
EDITS = ("mask", "tau")  # what `bitdance edit` may say
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
    """What `bitdance sizes` says of a model folder: the one size of a class model, those of the published schedules for
    prompts."""
    found = LAYOUT.check(folder)
    s, known = found.tokenizer.downsampling, list(found.sizes)
    if found.config.rotary:
        known = sorted({(h * s, w * s) for sides in SCHEDULES.values() for h, w in sides[3:]} | set(known))
    sides = sorted({side for size in known for side in size})
    return {
        "default": found.sizes[0],
        "sizes": known,
        "only_these": True,
        "multiple_of": s,
        "smallest_side": sides[0],
        "largest_side": sides[-1],
    }


def edit_settings(pipe: NextScalePipeline, preset: str | None, said: dict[str, Any]) -> dict[str, Any]:
    """What an edited picture says of its settings."""
    settings = pipe.settings(preset, **said)
    return {"guidance": settings.guidance, **settings.words}


def bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `bitdance bench` found, as JSON values and for people."""
    from bitdance.kinds.next_scale.speed import measure_speed

    return measure_speed(options)
