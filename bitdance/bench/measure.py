"""Contenders take turns, so that a busy moment of the machine meets all of them: warm-up, then rounds, then medians."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bitdance.bench.phases import PhaseClock
from bitdance.bench.plain import generate_plain
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.picture import to_pil, write_png
from bitdance.pipeline import BitDancePipeline

PROMPT = "a fox in the snow, watercolour"


@dataclass
class Contender:
    """Makes `batch` pictures, prompt to PNG files. `make` marks what follows the bits, and returns them (B,C,h,w)."""

    model: BitDanceModel
    batch: int
    make: Callable[[PhaseClock], Tensor]
    wall: list[dict[str, float]] = field(default_factory=list)
    cpu: list[dict[str, float]] = field(default_factory=list)
    bits: Tensor | None = None
    peak_memory: int | None = None

    def run(self, counted: bool) -> None:
        """One batch. On CUDA also the largest memory that was taken during it, weights included."""
        device = self.model.backbone.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clock = PhaseClock(self.model)
        with clock:
            self.bits = self.make(clock)
        if device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(device)
        if counted:
            wall, cpu = clock.spent()
            self.wall.append(wall)
            self.cpu.append(cpu)

    def median(self, cpu: bool = False) -> dict[str, float]:
        """Seconds by phase, and in all under "total"."""
        runs = self.cpu if cpu else self.wall
        phases = {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
        return phases | {"total": statistics.median(sum(run.values()) for run in runs)}


def pipeline(pipe: BitDancePipeline, sampling: Sampling, height: int, width: int, batch: int, prompt: str = PROMPT) -> Contender:
    """What users get."""

    def make(clock: PhaseClock) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        bits_BChw = pipe.generate([prompt] * batch, height, width, sampling, generators)
        clock.mark("head")
        _write(pipe.decode_tensor(bits_BChw, generators), clock)
        return bits_BChw

    return Contender(pipe.model, batch, make)


def baseline(
    model: BitDanceModel, steps: int, guidance: float, height: int, width: int, batch: int, prompt: str = PROMPT
) -> Contender:
    """The published procedure as it stands, on a model that no pipeline has touched."""
    assert model.tokenizer is not None
    tokenizer = model.tokenizer

    @torch.no_grad()
    def make(clock: PhaseClock) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        h, w = height // tokenizer.downsampling, width // tokenizer.downsampling
        bits_BChw = generate_plain(model, prompt, h, w, steps, guidance, generators)
        clock.mark("other")
        _write(tokenizer.decode(bits_BChw.to(next(tokenizer.decoder.parameters()).dtype), generators[0]), clock)
        return bits_BChw

    return Contender(model, batch, make)


def _write(images_B3HW: Tensor, clock: PhaseClock) -> None:
    clock.mark("decode")
    with tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(to_pil(images_B3HW)):
            write_png(picture, Path(folder) / f"{number}.png", {"prompt": PROMPT, "seed": number})
    clock.mark("png")


def take_turns(contenders: Sequence[Contender], repeats: int, after: Callable[[], object] = lambda: None) -> None:
    """Run each contender once to warm up, then `repeats` rounds; `after` is called after every run."""
    for round_ in range(repeats + 1):
        for contender in contenders:
            contender.run(counted=round_ > 0)
            after()
