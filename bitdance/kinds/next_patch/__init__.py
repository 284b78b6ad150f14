"""Next-patch diffusion from text: the kind of a model folder that names none. What it offers: see `bitdance.generator`."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitdance.costs.memory import BatchSpec, check_memory
from bitdance.folder.adapters import Adapter
from bitdance.folder.checkpoint import load_model
from bitdance.folder.config import check_folder
from bitdance.folder.fingerprint import fingerprint
from bitdance.folder.parts import file_sizes, parameters
from bitdance.folder.sizes import Size, default_size, rule_of_folder, supported_sizes
from bitdance.heads.diffusion.settings import PRESETS, Sampling, choose
from bitdance.jobs.job import Request
from bitdance.jobs.runner import RunSpec
from bitdance.networks.precision import DTYPES
from bitdance.pipeline import BitDancePipeline
from bitdance.verify.compare import compare
from bitdance.verify.examine import examine

load_pipeline = BitDancePipeline.from_pretrained
__all__ = ["batch_needs", "bench", "compare", "examine", "info", "load_pipeline", "rules", "sizes"]


class JobRules:
    """What `bitdance generate` asks of a text model: a folder that is whole, and whose weights are not loaded. `unknown`: options
    of the command that are not for such a model."""

    presets = tuple(PRESETS)
    unknown = ("cfg_schedule", "tau", "schedule")

    def __init__(self, folder: Path) -> None:
        self.folder, self._config = folder, check_folder(folder)

    @property
    def default_size(self) -> Size:
        """(height, width) where nothing is said."""
        return self._config.size

    def check_size(self, height: int, width: int, settings: Any = None) -> None:
        """ValueError for a size that the model does not make, or not with these settings."""
        self._config.check_size(height, width)

    def adapt(self, adapter: Adapter) -> None:
        """Take over the defaults that come with an adapter."""
        self._config = replace(self._config, extras=adapter.settled(self._config.extras))

    def sampling(self, given: dict[str, Any], preset: str | None, remade: bool) -> Sampling:
        """What was given, else the preset, else the model's defaults; without their preset where a picture is made again, which
        says what it does not have from the published procedure."""
        defaults = {name: value for name, value in self._config.defaults.items() if not (remade and name == "preset")}
        return choose(defaults, preset, **{name: value for name, value in given.items() if name not in self.unknown})

    def requests(self, request: Request) -> Iterator[Request]:
        """The request as it is. ValueError for one of a class."""
        if request.label is not None:
            raise ValueError(f"{request.source}: this model makes pictures of prompts; a class needs a class model (--model)")
        yield request

    def fingerprint(self) -> str:
        """What tells the model from others."""
        return fingerprint(self.folder)

    def load(self, spec: RunSpec) -> BitDancePipeline:
        """The pipeline of a run. ValueError, before a weight is read, when its batches do not fit into the memory, with what
        would help."""
        check_memory(self._config, batch_specs(spec), spec.device, spec.model)
        home = "cpu" if spec.offload else spec.device
        model = load_model(
            replace(self._config, folder=spec.folder), home, DTYPES[spec.dtype], generation_only=True, **spec.loading
        )
        pipe = BitDancePipeline(model, spec.compile)
        if spec.offload:
            pipe.enable_model_cpu_offload(spec.device)
        return pipe


rules = JobRules


def batch_specs(spec: RunSpec) -> set[BatchSpec]:
    """The batches of a run as far as their memory goes, one for each size."""
    batch = min(spec.batch_size, len(spec.jobs))
    kind = "cuda" if spec.device.startswith("cuda") else "cpu"
    options = (spec.quantize, spec.quantize_head, spec.offload)
    return {
        BatchSpec(h, w, batch, spec.dtype, kind, guided, *options, many=len(spec.jobs) > batch) for h, w, guided in spec.sizes
    }


def info(folder: Path) -> dict[str, Any]:
    """What `bitdance info` says of a model folder; no weights are loaded."""
    config, parts, files = check_folder(folder), parameters(folder), file_sizes(folder)
    rule = rule_of_folder(folder)
    return {
        "parameters": sum(parts.values()),
        "parts": parts,
        "bits_per_token": config.head.ch_target,
        "downsampling": rule.downsampling,
        "patch_side": rule.patch_side,
        "tokens_per_step": config.head.parallel_num,
        "default_size": config.size,
        "sizes": supported_sizes(rule),
        "defaults": config.defaults,
        "card": config.extras.get("card", {}),
        "fingerprint": fingerprint(folder),
        "bytes": sum(files.values()),
        "files": files,
    }


def sizes(folder: Path) -> dict[str, Any]:
    """What `bitdance sizes` says of a model folder."""
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


def bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `bitdance bench` found, as JSON values and for people."""
    from bitdance.kinds.next_patch.speed import measure_speed

    return measure_speed(options)


def batch_needs(options: argparse.Namespace) -> dict[str, Any]:
    """What `bitdance doctor` says of a batch of pictures."""
    from bitdance.kinds.next_patch.needs import needs_of_batch

    return needs_of_batch(options)
