"""What there is to say about a step: losses over all processes, speed, waiting, memory, skipped samples."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from bitdance.costs.peak import measure_peak
from bitdance.networks.precision import quick_dtype
from stages.config import RunConfig
from stages.engine import processes
from stages.engine.learner import precision_of
from stages.feed import MicroBatch
from stages.recipe import Recipe

# FLOP/s of dense bfloat16 products, by a part of the device's name; makers' data sheets
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A6000": 155e12}


class StepMetrics:
    """Counts since the last row. `take` micro-batches, `note` what those of a logged step returned, then ask for the `row`."""

    def __init__(self, recipe: Recipe, run: RunConfig, start: int, device: torch.device) -> None:
        self.run, self.length, self.flops, self.device = run, recipe.feed.length, recipe.flops, device
        self.peak = peak_flops(device, precision_of(run)) if recipe.flops else math.nan
        self.skipped: Counter[str] = Counter()  # since this start of the run
        self._noted: dict[str, list[Tensor]] = defaultdict(list)
        self._begin(start)

    def _begin(self, step: int) -> None:
        self._step, self._clock = step, time.monotonic()
        self._waited, self._tokens, self._positions = 0.0, 0, 0

    def take(self, micros: Iterator[MicroBatch]) -> MicroBatch:
        """The next micro-batch; waiting for it counts as such."""
        asked = time.monotonic()
        micro = next(micros)
        self._waited += time.monotonic() - asked
        self._tokens += micro.tokens
        self._positions += micro.positions
        self.skipped.update(micro.skipped)
        return micro

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside takes no time of the steps."""
        begun = time.monotonic()
        yield
        self._clock += time.monotonic() - begun

    def note(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._noted[name].append(value.detach())

    def row(self, step: int) -> dict[str, float]:
        """Of the steps up to `step`. All processes must take part.

        Noted values are means over the micro-batches of the step and over the processes that had one; NaN is none. `data_wait` (a
        share of the time) and `memory` (GB at its peak) are of the process that has most; `skipped` counts from this start on.
        """
        means = {name: float(torch.stack([v.float() for v in values]).nanmean()) for name, values in self._noted.items()}
        means = {name: value for name, value in means.items() if not math.isnan(value)}
        seconds = time.monotonic() - self._clock
        counts = {"tokens": self._tokens, "positions": self._positions, **{f"skipped/{k}": n for k, n in self.skipped.items()}}
        gathered = processes.all_gather((means, counts, self._waited / seconds, _memory(self.device)))
        noted, counted, waits, memories = zip(*gathered, strict=True)
        names = dict.fromkeys(name for values in noted for name in values)
        row = {name: fmean(values[name] for values in noted if name in values) for name in names}
        total: Counter[str] = Counter()
        for counts in counted:
            total.update(counts)
        tokens, positions = total.pop("tokens"), total.pop("positions")
        samples = self.run.batch_size * self.run.accumulation * processes.world()  # of one step
        row |= {"images_per_s": (step - self._step) * samples / seconds, "epoch": step * samples / self.length}
        if tokens:
            row |= {"tokens_per_s": tokens / seconds, "packing": tokens / positions}
        if tokens and self.flops and not math.isnan(self.peak):
            reached = self.flops * tokens / seconds / processes.world()
            self.peak = max(self.peak, reached)  # a peak measured while the machine had other work is too low
            row["mfu"] = reached / self.peak
        row |= {"data_wait": max(waits), "memory": max(memories), "skipped": sum(total.values()), **total}
        self._noted.clear()
        self._begin(step)
        return row


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of one process: of a GPU the maker's figure, NaN where that is unknown; of a CPU what its quickest large product
    reaches."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAKS.items() if part in name), math.nan)
    # a processor without instructions for bfloat16 is quicker in float32
    quick = precision != "float32" and quick_dtype(device) == "bfloat16"
    return _measured(torch.bfloat16 if quick else torch.float32, torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, threads: int) -> float:
    """Of this machine's CPU with so many threads, in half a second; no random number of the run is used."""
    with torch.random.fork_rng(devices=[]):
        return measure_peak("cpu", dtype, side=1024).flops_per_s


def _memory(device: torch.device) -> float:
    """GB at the peak of this process: tensors on a GPU, else all that is resident; NaN where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), math.nan)
