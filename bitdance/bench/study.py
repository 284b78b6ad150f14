"""A question (model, size, settings) and its two answers, computed and measured, as one JSON object each."""

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bitdance.bench.measure import PROMPT, Contender, baseline, pipeline, take_turns
from bitdance.bench.models import bare_model, open_model, text_tokenizer
from bitdance.bench.report import phase_records
from bitdance.costs.memory import GB, free_bytes
from bitdance.costs.peak import Peak, measure_peak, on_cpu_time
from bitdance.costs.work import PHASES, Generation, turning_batch, work
from bitdance.folder.config import ModelConfig
from bitdance.heads.diffusion.settings import Sampling
from bitdance.networks.quantize import check_quantization, quantized_bytes
from bitdance.pipeline import DTYPES, BitDancePipeline
from bitdance.sequence.prompt import conditional_ids, unconditional_ids


@dataclass(frozen=True)
class Study:
    """Every precision × batch size × preset. `published` is how the yardstick samples. `quantize` and `quantize_head` as in
    `bitdance.networks.quantize`, `compile` as in `BitDancePipeline`."""

    model: ModelConfig
    height: int
    width: int
    dtypes: Sequence[str]
    batches: Sequence[int]
    presets: Mapping[str, Sampling]
    published: Sampling
    quantize: str | None = None
    quantize_head: str | None = None
    compile: bool | None = None

    def roofline(self, peak: Peak) -> dict[str, Any]:
        """What a machine of this peak needs at least; nothing is built or run."""
        found = self._question() | {"turns": []}
        for dtype in self.dtypes:
            found["peaks"][dtype] = asdict(peak)
            for preset, sampling in self.presets.items():
                one, two = (self._work(found, dtype, sampling, batch) for batch in (1, 2))
                turns = {phase: turning_batch(one[phase], two[phase], peak) for phase in PHASES}
                found["turns"].append({"dtype": dtype, "preset": preset, **turns})
                for batch in self.batches:
                    phases = phase_records(self._work(found, dtype, sampling, batch), peak)
                    speed = peak.devices * batch / phases["total"]["floor_seconds"]
                    found["runs"].append(_setting(dtype, preset, sampling, batch) | {"images_per_s": speed, "phases": phases})
        return found

    def measure(self, device: torch.device, repeats: int, with_baseline: bool) -> dict[str, Any]:
        """Medians of `repeats` rounds on `device`. ValueError where the weights alone do not fit."""
        check_quantization(self.quantize, self.quantize_head, device)
        plain_dtype = "bfloat16" if device.type == "cuda" else "float32"  # the published one knows no other
        self._check_memory(device, [*self.dtypes, *([plain_dtype] if with_baseline else [])])
        cpu_time, found = on_cpu_time(device), self._question()
        found["machine"] = {
            "device": str(device),
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "clock": "CPU time" if cpu_time else "wall",
        }
        plain = open_model(self.model, device, DTYPES[plain_dtype]) if with_baseline else None
        pipes = {
            dtype: BitDancePipeline(
                open_model(self.model, device, DTYPES[dtype], self.quantize, self.quantize_head), self.compile
            )
            for dtype in self.dtypes
        }
        peaks = {dtype: measure_peak(device, DTYPES[dtype]) for dtype in self.dtypes}
        found["peaks"] = {dtype: asdict(peak) for dtype, peak in peaks.items()}
        settings = [(dtype, preset) for dtype in self.dtypes for preset in self.presets]
        rounds = len(self.batches) * (repeats + 1) * (len(settings) + with_baseline)
        with tqdm(total=rounds, desc="runs", disable=not sys.stderr.isatty()) as bar:
            for batch in self.batches:
                task = self.height, self.width, batch
                ours = [pipeline(pipes[dtype], self.presets[preset], *task) for dtype, preset in settings]
                base = baseline(plain, self.published.steps, self.published.guidance, *task) if plain else None
                take_turns([*([base] if base else []), *ours], repeats, bar.update)
                if base:
                    found["yardsticks"].append(_setting(plain_dtype, "yardstick", self.published, batch) | _spent(base, cpu_time))
                for (dtype, preset), contender in zip(settings, ours):
                    sampling = self.presets[preset]
                    run = _setting(dtype, preset, sampling, batch) | _spent(contender, cpu_time)
                    costs = self._work(found, dtype, sampling, batch)
                    run["phases"] = phase_records(costs, peaks[dtype], contender.median(cpu_time))
                    if base:
                        run["yardstick"] = {"times_faster": base.median(cpu_time)["total"] / run["seconds"]}
                        if dtype == plain_dtype and sampling == self.published:
                            assert contender.bits is not None and base.bits is not None
                            run["yardstick"]["equal_bits"] = (contender.bits == base.bits).double().mean().item()
                    found["runs"].append(run)
        return found

    def _question(self) -> dict[str, Any]:
        words, parts = text_tokenizer(self.model), bare_model(self.model).named_children()
        return {
            "shape": self.model.name,
            "weights": "random" if self.model.folder is None else "trained",
            "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts},
            "height": self.height,
            "width": self.width,
            "blocks": self.model.blocks(self.height, self.width),
            "quantized": {"backbone": self.quantize, "head": self.quantize_head},
            "prompt_tokens": [len(conditional_ids(words, PROMPT)), len(unconditional_ids(words))],
            "peaks": {},
            "runs": [],
            "yardsticks": [],
        }

    def _work(self, found: Mapping[str, Any], dtype: str, sampling: Sampling, batch: int) -> dict[str, Any]:
        text = found["prompt_tokens"][0], found["prompt_tokens"][1]
        weights = _weight_bytes(self.quantize), _weight_bytes(self.quantize_head)
        return work(self.model, Generation(self.height, self.width, batch, sampling, text, DTYPES[dtype].itemsize, *weights))

    def _check_memory(self, device: torch.device, dtypes: Sequence[str]) -> None:
        numbers = sum(weight.numel() for weight in bare_model(self.model).parameters())
        needed = numbers * sum(DTYPES[dtype].itemsize for dtype in dtypes)
        free = free_bytes(str(device))
        if free is not None and needed > free:
            raise ValueError(
                f"{self.model.name} takes {needed / GB:.1f} GB of weights in {' and '.join(dtypes)}, and {device} has "
                f"{free / GB:.1f} GB free; name fewer dtypes, leave the yardstick out, or compute a floor with --floor"
            )


def _weight_bytes(kind: str | None) -> float | None:
    """Bytes of one weight of a large matrix, scales included."""
    return None if kind is None else quantized_bytes(4096, 4096, kind) / 4096**2


def _processor() -> str:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        return {name.strip(): value.strip() for name, value in fields.items()}["model name"]
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _setting(dtype: str, preset: str, sampling: Sampling, batch: int) -> dict[str, Any]:
    return {"dtype": dtype, "preset": preset, "sampling": asdict(sampling), "batch": batch}


def _spent(contender: Contender, cpu_time: bool) -> dict[str, Any]:
    phases, wall, cpu = contender.median(cpu_time), contender.median()["total"], contender.median(True)["total"]
    return {
        "seconds": phases["total"],
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "images_per_s": contender.batch / phases["total"],
        "peak_memory_bytes": contender.peak_memory,
        "phases": {phase: {"seconds": seconds} for phase, seconds in phases.items()},
    }
