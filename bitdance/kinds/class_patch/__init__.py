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
