"""What this machine gives at best: a large matrix product, and a large copy. Measured, never looked up."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdance.networks.kernels import served_by_onednn
from bitdance.networks.precision import slow_bfloat16

# What a large product in bfloat16 and a large copy are taken to reach: 80 % of the data sheets' 989 TFLOP/s (both), 90 % of their
# 4.8 and 3.35 TB/s.
GPUS = {"h200": (790e12, 4.3e12), "h100": (790e12, 3.0e12)}
_MACHINE = re.compile(r"(?:([1-9][0-9]{0,4})x)?(.+)")


@dataclass(frozen=True)
class Peak:
    """`flops_per_s` by the fastest `kernel`, `bytes_per_s` read and written by a copy, of each of so many `devices`, which make
    pictures of their own."""

    flops_per_s: float
    bytes_per_s: float
    kernel: str = "given"
    devices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Peak":
        """Read a peak from the name of a GPU ("h200", eight of them "8xh200") or "FLOPS,BYTES_PER_S", for instance
        "790e12,4.3e12". ValueError says what is expected."""
        match = _MACHINE.fullmatch(text.lower())
        count, machine = match.groups() if match else (None, "")
        try:
            flops, bytes_per_s = GPUS[machine] if machine in GPUS else map(float, machine.split(","))
        except ValueError:
            flops = bytes_per_s = 0.0
        if not (0 < flops < float("inf") and 0 < bytes_per_s < float("inf")):
            raise ValueError(
                f"floor = {text!r:.80}; give {' or '.join(GPUS)}, several as 8xh200, or floating point operations and bytes per "
                "second, for instance 790e12,4.3e12"
            )
        return cls(flops, bytes_per_s, machine.upper() if machine in GPUS else "given", int(count or 1))


def measure_peak(device: torch.device | str, dtype: torch.dtype, side: int | None = None, repeats: int | None = None) -> Peak:
    """The best of `repeats` on `device`; products of side × side matrices (default: 5 of 2048 on a CPU,
    768 where it is slow in this dtype, else 20 of 8192)."""
    device = torch.device(device)
    usual = 8192 if device.type != "cpu" else 768 if dtype == torch.bfloat16 and slow_bfloat16(device) else 2048
    side, repeats = side or usual, repeats or (5 if device.type == "cpu" else 20)
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    speeds = {
        name: 2 * side**3 / best_seconds(lambda run=run: run(x, weight), device, repeats)  # type: ignore[misc]
        for name, run in _kernels(device, dtype).items()
    }
    kernel = max(speeds, key=lambda name: speeds[name])
    source = torch.ones(8 * side * side, device=device)  # beyond every cache, and written: untouched pages are all one page
    target = torch.zeros_like(source)
    copying = best_seconds(lambda: target.copy_(source), device, repeats)
    return Peak(speeds[kernel], 2 * source.numel() * source.element_size() / copying, kernel)


def _kernels(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The kernels to choose from: on CPUs that are not its maker's, MKL, which serves float32, may be half as fast as oneDNN."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": F.linear}
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and served_by_onednn(dtype):
        found["oneDNN"] = lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Shortest of `repeats` runs after one that warms up."""
    seconds, now = [], time.process_time if on_cpu_time(device) else time.perf_counter
    for _ in range(repeats + 1):
        wait(device)
        begun = now()
        run()
        wait(device)
        seconds.append(now() - begun)
    return min(seconds[1:])


def on_cpu_time(device: torch.device) -> bool:
    """Whether seconds are this process's CPU time: with one thread that is the work, whatever else the machine does."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def wait(device: torch.device) -> None:
    """Wait until everything that was started on `device` has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
