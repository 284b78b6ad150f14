"""One number of processes: how the batch is divided, what a process needs in memory, and what to change where it does not fit."""

from dataclasses import dataclass, replace
from functools import cached_property

from bitdance.sequence.prompt import SpecialTokens
from stages.config import TrainingConfig
from stages.plan import memory
from stages.plan.companion import Companion
from stages.plan.shape import Count, Shape
from stages.plan.workload import KERNEL_ROWS, Workload, shown

GIB = 2**30
RESERVE = 0.06  # of a GPU: the driver's context, communication, gaps between tensors
PICTURES = 8  # of a sample grid without prompts of its own
MOST_PROCESSES = 4096


@dataclass(frozen=True)
class Column:
    """The run on `processes` GPUs. `memory`: bytes of one of them by part, of which not all are taken at one time; `training` and
    `validation` are the peaks, `host` what offloading puts into the machine's own memory."""

    processes: int
    batch_size: int
    accumulation: int
    samples: int  # of a step
    hours: float
    fullest: str  # micro-step, and the rows × positions it is laid out in
    rows: tuple[int, int]
    memory: dict[str, float]
    training: float
    validation: float
    host: float
    fits: bool
    advice: tuple[str, ...]


@dataclass
class Subject:
    """What is planned. `pixels`: the GPUs encode the pictures; `companion`: what runs beside, if anything."""

    config: TrainingConfig
    shape: Shape
    workload: Workload
    special: SpecialTokens
    counts: dict[str, Count]
    pixels: bool
    companion: Companion | None = None

    def states(self, processes: int, config: TrainingConfig | None = None) -> memory.States:
        config = config or self.config
        own = [part for name, part in self.counts.items() if name != "tokenizer"]
        trained, total = sum(part.trained for part in own), sum(part.all for part in own)
        largest = max(part.largest for part in own)
        run = config.run
        return memory.states(trained, total - trained, largest, run.precision, run.ema > 0, config.deepspeed, processes)

    @cached_property
    def _known(self) -> dict[tuple[int, ...], tuple[tuple[int, int], memory.Activations]]:
        return {}

    def micro_step(self, resolutions: tuple[int, ...]) -> tuple[tuple[int, int], memory.Activations]:
        """Rows × positions, and what the passes need."""
        if resolutions not in self._known:
            config, bits = self.config, self.shape.tokenizer.bits
            batch = self.workload.batch(resolutions, self.special, bits, KERNEL_ROWS if config.data.row_tokens else 1)
            dense = config.generator.attention == "dense"
            needed = memory.activations(self.shape, config.generator, config.run.precision, batch, dense)
            self._known[resolutions] = (batch.ids_BL.shape[0], batch.ids_BL.shape[1]), needed
        return self._known[resolutions]

    def beside(self, resolutions: tuple[int, ...]) -> float:
        """What a pass of the companion takes."""
        if self.companion is None:
            return 0.0
        config, shape = self.config, self.companion.shape
        workload = self.workload.in_blocks(shape.head.parallel_num)
        rows = KERNEL_ROWS if config.data.row_tokens else 1
        batch = workload.batch(resolutions, self.special, shape.tokenizer.bits, rows)
        return self.companion.peak(batch, config.generator.attention == "dense")

    @cached_property
    def validation(self) -> dict[str, float]:
        """What a sample grid needs; under ZeRO 3 every process holds the whole model to validate, to sample and to save."""
        config, s = self.config, self.shape.tokenizer.downsampling
        grid = len(config.generator.sample_prompts) or PICTURES
        largest = max(self.workload.documents)
        H, W = (int(config.generator.defaults.get(side, largest)) for side in ("height", "width"))
        tokens = self.workload.prompt + 2 + self.shape.head.parallel_num + (H // s) * (W // s)
        width = memory.weight_bytes(config.run.precision)
        total = sum(part.all for name, part in self.counts.items() if name != "tokenizer")
        return {
            "whole model, to judge and save": float(width * total) if config.deepspeed.zero_stage == 3 else 0.0,
            "keys and values of a sample grid": float(memory.cache_bytes(self.shape, 2 * grid, tokens, width)),
            "decoding of a sample grid": memory.tokenizer_peak(self.shape.tokenizer, 1, H, W, decode=True),
        }

    def encoding(self, resolutions: tuple[int, ...]) -> float:
        """Pictures of one size are encoded together."""
        if not self.pixels:
            return 0.0
        return max(
            memory.tokenizer_peak(self.shape.tokenizer, resolutions.count(r), r, r, decode=False) for r in set(resolutions)
        )


def divide(samples: int, processes: int, wanted: int) -> tuple[int, int]:
    """(batch size, accumulation) that make up so many samples of a step, as far as they divide.

    The wanted batch size, or the next smaller one that leaves nothing over.
    """
    each = max(1, round(samples / processes))
    size = next(size for size in range(min(wanted, each), 0, -1) if each % size == 0)
    return size, each // size


def column(subject: Subject, processes: int, samples: int, hours: float, gpu_memory: float) -> Column:
    """`hours` of the whole run on this many processes, `gpu_memory` in GiB."""
    run = subject.config.run
    size, accumulation = divide(samples, processes, run.batch_size)
    made = size * accumulation * processes
    fullest = subject.workload.fullest(size)
    rows, passes = subject.micro_step(fullest)
    states, validation, companion = subject.states(processes), subject.validation, subject.companion
    tokenizer = 4.0 * subject.counts["tokenizer"].all
    beside = subject.beside(fullest)
    held, host = (companion.gpu, companion.host) if companion else (0.0, 0.0)
    encoding = subject.encoding(fullest)
    lines = {
        "weights": states.weights,
        "gradients": states.gradients,
        "moments, float32 weights": states.optimizer,
        "average": states.average,
        "tokenizer (frozen)": tokenizer,
        **({companion.line: companion.gpu} if companion else {}),
        "communication buckets": states.buckets,
        "gathered weights (ZeRO 3)": states.gathered,
        "activations kept": passes.kept,
        "on top at the peak": passes.most - passes.kept,
        **({f"a pass of the {companion.name}": beside} if companion else {}),
        "encoding the pictures": encoding,
        "optimiser's step": states.step,
        **validation,
    }
    always = states.kept + states.buckets + tokenizer + held
    training = always + max(states.gathered + max(passes.most, passes.kept + beside), encoding, states.step)
    whole, cache, decoding = validation.values()
    looking = always + whole + max(cache, decoding)
    room = gpu_memory * GIB * (1 - RESERVE)
    advice = []
    if made != samples:
        advice.append(f"{samples:,} samples of a step do not divide among {processes} processes; nearest is {made:,}")
    if (size, accumulation) != (run.batch_size, run.accumulation):
        advice.append(f"run.batch_size = {size}, run.accumulation = {accumulation}")
    if max(training, looking) > room:
        advice.append(_remedies(subject, processes, size, training - always, looking - always, always, room))
    fits = max(training, looking) <= room
    shape = (processes, size, accumulation, made, hours, shown(fullest), rows)
    return Column(*shape, lines, training, looking, states.host + host, fits, tuple(advice))


def _remedies(subject: Subject, processes: int, size: int, passes: float, looking: float, always: float, room: float) -> str:
    """What helps, the cheapest first. `passes` and `looking`: what training and validation need beside what is `always` there."""
    config, found = subject.config, []
    deepspeed = config.deepspeed
    if always + passes > room:
        if not config.generator.checkpoint_activations:
            found.append("generator.checkpoint_activations = true")
        if always < room and size > 1:
            found.append(f"run.batch_size = {max(1, int(size * (room - always) / passes))}")
        if deepspeed.zero_stage < 3 and processes > 1:
            found.append("deepspeed.zero_stage = 3")
    else:
        found.append("fewer or smaller pictures in the sample grid")
    kept, needed = subject.states(processes).kept, always + max(passes, looking)
    if deepspeed.zero_stage and not deepspeed.offload_optimizer:
        moved = replace(config, deepspeed=replace(deepspeed, offload_optimizer=True))
        saved = kept - subject.states(processes, moved).kept
        if needed - saved <= room:
            found.append(f"deepspeed.offload_optimizer = true (saves {saved / GIB:.0f} GiB)")
    if (companion := subject.companion) and needed - companion.saving <= room:
        found.append(f"{companion.remedy} (saves {companion.saving / GIB:.0f} GiB)")
    more = processes
    while more < MOST_PROCESSES and needed - kept + subject.states(more).kept > room:
        more *= 2
    if deepspeed.zero_stage and more < MOST_PROCESSES:
        found.append(f"{more} GPUs")
    what = "training" if always + passes > room else "validation and saving"
    return f"{what} does not fit; try {' or '.join([*found, 'GPUs with more memory'])}"
