"""Class-conditional next-patch diffusion: the ImageNet models of the BitDance paper. What it offers: see `bitdance.generator`."""

from pathlib import Path
from typing import Any


def load_pipeline(folder: Path | str, device: Any = None, dtype: Any = None, **options: Any) -> Any:
    """A `ClassPipeline`."""
    from bitdance.kinds.class_patch.pipeline import ClassPipeline

    return ClassPipeline.from_pretrained(folder, device, dtype, **options)


def info(folder: Path) -> dict[str, Any]:
    """What `bitdance info` says of a model folder; no weights are loaded."""
    from bitdance.kinds.class_patch import facts

    return facts.info(folder)


def examine(folder: Path, own: Path | None = None) -> dict[str, Any]:
    """What `bitdance verify` says of a model folder."""
    from bitdance.kinds.class_patch import facts

    return facts.examine(folder, own)


def rules(folder: Path) -> Any:
    """What `bitdance generate` asks: conditions, sizes, settings, and the pipeline in the end."""
    from bitdance.kinds.class_patch.job_rules import JobRules

    return JobRules(folder)


def sizes(folder: Path) -> dict[str, Any]:
    """What `bitdance sizes` says of a model folder: the one size that it makes."""
    from bitdance.kinds.class_patch.folder import check_folder

    side = check_folder(folder).side
    one = {"default": (side, side), "sizes": [(side, side)], "only_these": True}
    return {**one, "multiple_of": side, "smallest_side": side, "largest_side": side}


def compare(folder: Path, other: Path) -> dict[str, Any]:
    """What `bitdance verify --against` says of two model folders."""
    from bitdance.kinds.class_patch import facts

    return facts.compare(folder, other)
