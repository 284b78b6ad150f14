"""Next-patch diffusion from text: the kind of a model folder that names none. What it offers: see `bitdance.generator`."""

from pathlib import Path
from typing import Any


def load_pipeline(folder: Path | str, device: Any = None, dtype: Any = None, **options: Any) -> Any:
    """A `BitDancePipeline`."""
    from bitdance.pipeline import BitDancePipeline

    return BitDancePipeline.from_pretrained(folder, device, dtype, **options)


def info(folder: Path) -> dict[str, Any]:
    """What `bitdance info` says of a model folder; no weights are loaded."""
    from bitdance.checkpoint import check_folder, read_extras
    from bitdance.cli.model_files import parts
    from bitdance.fingerprint import fingerprint
    from bitdance.sizes import default_size, rule_of_folder, supported_sizes

    head = check_folder(folder)
    rule, extras, networks = rule_of_folder(folder), read_extras(folder), parts(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "parameters": sum(part.parameters for part in networks),
        "parts": {part.name: part.parameters for part in networks},
        "bits_per_token": head.ch_target,
        "downsampling": rule.downsampling,
        "patch_side": rule.patch_side,
        "tokens_per_step": head.parallel_num,
        "default_size": default_size(rule),
        "sizes": supported_sizes(rule),
        "defaults": extras.get("defaults", {}),
        "card": extras.get("card", {}),
        "fingerprint": fingerprint(folder),
        "bytes": sum(files.values()),
        "files": files,
    }


def examine(folder: Path, own: Path | None = None) -> dict[str, Any]:
    """What `bitdance verify` says of a model folder."""
    from bitdance.verify import examine as verify

    return verify.examine(folder, own)


def rules(folder: Path) -> Any:
    """What `bitdance generate` asks: conditions, sizes, settings, and the pipeline in the end."""
    from bitdance.kinds.next_patch.job_rules import JobRules

    return JobRules(folder)


def sizes(folder: Path) -> dict[str, Any]:
    """What `bitdance sizes` says of a model folder."""
    from bitdance.sizes import default_size, rule_of_folder, supported_sizes

    rule = rule_of_folder(folder)
    usable = [side * rule.downsampling for side in rule.sides if side % rule.patch_side == 0]
    return {
        "default": default_size(rule),
        "sizes": supported_sizes(rule),
        "only_these": bool(rule.trained),
        "multiple_of": rule.unit,
        "smallest_side": min(usable),
        "largest_side": max(usable),
    }


def compare(folder: Path, other: Path) -> dict[str, Any]:
    """What `bitdance verify --against` says of two model folders."""
    from bitdance.verify import compare as verify

    return verify.compare(folder, other)
