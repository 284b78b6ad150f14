"""The plan of a run, without weights or data: what trains, on how much, for how long, does it fit."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance.folder.sizes import TOKENIZER_CONFIG
from bitdance.networks.precision import quick_dtype
from bitdance.networks.text_encoder import width_of
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig, build_tokenizer, config_of
from lfq_tokenizer.json_file import read_config, read_json
from stages.config import TrainingConfig
from stages.data.shards import ShardIndex
from stages.engine.learner import precision_of
from stages.plan import memory
from stages.plan.command import gpus, processor
from stages.plan.fit import GIB, RESERVE, divide
from stages.plan.flops import encoder_flops
from stages.plan.plan import Machine
from stages.plan.shape import folder_here
from stages.recipes.pictures.config import PictureTraining
from stages.recipes.pictures.flops import picture_flops


class Subject(Protocol):
    """What a kind says of the network that trains."""

    @property
    def training(self) -> PictureTraining: ...

    def tokenizer(self, config: TrainingConfig) -> tuple[PictureTokenizerConfig, str]:
        """The tokenizer's shape where the tokenizer is not here, and the table that gives it."""
        ...

    def shape(self, tokenizer: PictureTokenizerConfig, classes: Callable[[], int]) -> Any:
        """The network's config. `classes` says how many there are, or that a plan needs to know."""
        ...

    def build(self, shape: Any) -> Any:
        """The network, with fresh weights."""
        ...

    def parts(self, network: Any) -> dict[str, Any]:
        """Its parts by name."""
        ...

    def loss_of(self, network: Any, B: int) -> Tensor:
        """The training loss of so many pictures of nothing."""
        ...

    def about(self, shape: Any) -> str:
        """What kind of pictures it makes, in half a sentence."""
        ...


class PictureSubject:
    """What most kinds say alike: on grids of bits, of a tokenizer that [tokenizer.model] describes."""

    def __init__(self, training: Any) -> None:
        self.training = training

    def tokenizer(self, config: TrainingConfig) -> tuple[PictureTokenizerConfig, str]:
        return config.tokenizer.model, "tokenizer.model"

    def grid(self, tokenizer: PictureTokenizerConfig) -> int:
        """Tokens along a side."""
        return int(self.training.size) // tokenizer.downsampling

    def classes_or_width(self, classes: Callable[[], int]) -> tuple[int | None, int | None]:
        """How many classes there are, or how many features a token of a caption has. ValueError where nothing says the latter."""
        if not self.training.text_encoder:
            return classes(), None
        if folder := folder_here(self.training.text_encoder):
            return None, width_of(folder)
        if not self.training.text_width:
            said, section = self.training.text_encoder, self.training.SECTION
            raise ValueError(
                f"{section}.text_encoder = {said!r} is not here; for a plan say its features in {section}.text_width"
            )
        return None, self.training.text_width


@dataclass(frozen=True)
class Column:
    """The run on so many processes. `training`: bytes of one of them at the peak of a step."""

    processes: int
    batch_size: int
    accumulation: int
    hours: float
    training: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """`flops` of one picture by part, `samples` of a step."""

    recipe: str
    about: str
    shape: dict[str, Any]
    parameters: dict[str, int]
    flops: dict[str, float]
    samples: int
    steps: int
    epochs: float | None
    machine: Machine
    columns: list[Column]
    assumed: list[str]

    def lines(self, here: bool) -> Iterator[str]:
        """The plan for people. `here`: on this machine's processor."""
        yield f"{self.recipe}: parameters"
        for name, count in self.parameters.items():
            yield f"  {name:34}{count:>16,}"
        yield self.about
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.flops.items() if value)
        flops = self.steps * self.samples * sum(self.flops.values())
        epochs = "" if self.epochs is None else f", {self.epochs:,.4g} epochs"
        yield f"FLOPs of a picture: {parts}"
        yield f"the run: {self.steps:,} steps of {self.samples:,} pictures{epochs}, {flops:.3g} FLOPs"
        for c in self.columns:
            where = "this processor" if here else f"{c.processes} GPU{'' if c.processes == 1 else 's'}"
            fits = "fits" if c.fits else f"does NOT fit: lower run.batch_size, or {self.recipe}.checkpoint_activations = true"
            yield (
                f"{where}: run.batch_size = {c.batch_size}, run.accumulation = {c.accumulation}, {c.hours:,.3g} hours, "
                f"{c.training / GIB:,.3g} GiB in training, {fits} in {self.machine.memory:.3g} GiB less {RESERVE:.0%}"
            )
        peak = f"{self.machine.tflops:,.3g} TFLOP/s, of which training reaches {self.machine.mfu:.0%}"
        yield f"assumed: {'; '.join([*self.assumed, f'a peak of {peak}'])}"


def plan_of_pictures(config: TrainingConfig, subject: Subject, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The plan as JSON values and as text. ValueError where the config says too little, or contradicts itself."""
    described = (arguments.processes, arguments.gpu_memory, arguments.peak_tflops, arguments.mfu)
    here = not torch.cuda.is_available() and all(value is None for value in described)
    plan = make_plan(config, subject, processor() if here else gpus(arguments), quick_dtype("cpu") if here else "bfloat16")
    if here and not plan.columns[0].fits:
        here, plan = False, make_plan(config, subject, gpus(arguments), "bfloat16")
    return {**asdict(plan), "device": "cpu" if here else "gpu"}, "\n".join(plan.lines(here))


def make_plan(config: TrainingConfig, subject: Subject, machine: Machine, quick: str) -> Plan:
    """The first number of processes is the one that the config's batch is meant for; the others keep the samples of a step.
    `quick`: what the precision "auto" means on the machine."""
    run, training, assumed = config.run, subject.training, []
    tokenizer: PictureTokenizerConfig
    if folder := folder_here(training.tokenizer):
        tokenizer = read_config(folder / TOKENIZER_CONFIG, config_of)
    else:
        tokenizer, table = subject.tokenizer(config)
        assumed.append(f"{training.SECTION}.tokenizer = {training.tokenizer!r}, whose shape [{table}] gives, is not here")
    try:
        index = ShardIndex.open(config.data.train, config.data.keep)
        pictures, pixels = len(index), "bits" not in index.entries[0].members
    except OSError as error:
        pictures, pixels = 0, True
        assumed.append(f"the data are not here ({error}); shards of pictures, which are encoded on the way")
    shape = subject.shape(tokenizer, partial(_classes, training))
    with torch.device("meta"):
        model, frozen = subject.build(shape), build_tokenizer(tokenizer)
    count = {name: _count(part) for name, part in subject.parts(model).items()} | {"tokenizer (frozen)": _count(frozen)}
    count = {"head": 0, **count, "network": _count(model) - count.get("head", 0)}
    count = {name: number for name, number in count.items() if number}
    flops = {"network and head": picture_flops(lambda: subject.build(shape), subject.loss_of), "encoder": 0.0}
    if pixels:
        flops["encoder"] = encoder_flops(tokenizer, training.size, training.size)
    samples = run.batch_size * run.accumulation * machine.processes[0]
    seconds = run.steps * samples * sum(flops.values()) / (machine.mfu * machine.tflops * 1e12)
    precision = quick if run.precision == "auto" else precision_of(run)
    trained, largest = _count(model), max(p.numel() for p in model.parameters())
    columns = []
    for processes in machine.processes:
        size, accumulation = divide(samples, processes, run.batch_size)
        states = memory.states(trained, 0, largest, precision, run.ema > 0, config.deepspeed, processes)
        passes = _peak(subject, shape, size, precision)
        always = states.kept + states.buckets + 4.0 * count["tokenizer (frozen)"]
        encoding = memory.tokenizer_peak(tokenizer, size, training.size, training.size, decode=False) if pixels else 0.0
        most = always + max(states.gathered + passes, encoding, states.step)
        columns.append(
            Column(processes, size, accumulation, seconds / processes / 3600, most, most <= machine.memory * GIB * (1 - RESERVE))
        )
    epochs = run.steps * samples / pictures if pictures else None
    return Plan(
        config.recipe, subject.about(shape), shape.to_dict(), count, flops, samples, run.steps, epochs, machine, columns, assumed
    )


def _classes(training: PictureTraining) -> int:
    """ValueError where neither the config nor a file says how many."""
    if training.class_count:
        return training.class_count
    if training.classes:
        return len(read_json(Path(training.classes)))
    name = training.SECTION
    raise ValueError(f"{name}.class_count is 0, and no classes.json is named; a plan needs the number of classes, give it")


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _peak(subject: Subject, shape: Any, pictures: int, precision: str) -> float:
    """Bytes that a micro-step of so many pictures takes beside weights, gradients and moments, told by the model's own code on
    tensors without numbers. Linear in the pictures, so that two small batches tell a large one."""

    def one(B: int) -> float:
        with FakeTensorMode():
            model = subject.build(shape)
            for parameter in model.parameters():  # gradients are states
                parameter.register_post_accumulate_grad_hook(memory.drop)
            lower = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
            with memory.Live(model.parameters()) as live:
                with lower:
                    loss = subject.loss_of(model, B)
                loss.backward()
        return live.most

    two, four = one(2), one(4)
    return two + (pictures - 2) * (four - two) / 2
