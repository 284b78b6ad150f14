"""The plan of a run of recipe 'class_patch', without weights or data: what trains, on how much, for how long, does it fit."""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance.folder.sizes import TOKENIZER_CONFIG
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from bitdance.networks.precision import quick_dtype
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.json_file import read_config, read_json
from stages.data.shards import ShardIndex
from stages.engine.learner import precision_of
from stages.plan import memory
from stages.plan.command import gpus, processor
from stages.plan.fit import GIB, RESERVE, divide
from stages.plan.flops import encoder_flops
from stages.plan.plan import Machine
from stages.plan.shape import folder_here
from stages.recipes.class_patch.config import ClassTrainingConfig
from stages.recipes.class_patch.flops import picture_flops


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
        yield "class_patch: parameters"
        for name, count in self.parameters.items():
            yield f"  {name:34}{count:>16,}"
        shape = self.shape
        tokens, step = shape["grid"] ** 2, shape["parallel_num"]
        yield (
            f"{shape['num_classes']:,} classes, pictures of {tokens:,} tokens of {shape['latent_dim']} bits, "
            f"{step} token{'s' * (step > 1)} per step"
        )
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.flops.items() if value)
        flops = self.steps * self.samples * sum(self.flops.values())
        epochs = "" if self.epochs is None else f", {self.epochs:,.4g} epochs"
        yield f"FLOPs of a picture: {parts}"
        yield f"the run: {self.steps:,} steps of {self.samples:,} pictures{epochs}, {flops:.3g} FLOPs"
        for c in self.columns:
            where = "this processor" if here else f"{c.processes} GPU{'' if c.processes == 1 else 's'}"
            fits = "fits" if c.fits else "does NOT fit: lower run.batch_size, or class_patch.checkpoint_activations = true"
            yield (
                f"{where}: run.batch_size = {c.batch_size}, run.accumulation = {c.accumulation}, {c.hours:,.3g} hours, "
                f"{c.training / GIB:,.3g} GiB in training, {fits} in {self.machine.memory:.3g} GiB less {RESERVE:.0%}"
            )
        peak = f"{self.machine.tflops:,.3g} TFLOP/s, of which training reaches {self.machine.mfu:.0%}"
        yield f"assumed: {'; '.join([*self.assumed, f'a peak of {peak}'])}"


def plan_of_classes(config: ClassTrainingConfig, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The plan as JSON values and as text. ValueError where the config says too little, or contradicts itself."""
    described = (arguments.processes, arguments.gpu_memory, arguments.peak_tflops, arguments.mfu)
    here = not torch.cuda.is_available() and all(value is None for value in described)
    plan = make_plan(config, processor() if here else gpus(arguments), quick_dtype("cpu") if here else "bfloat16")
    if here and not plan.columns[0].fits:
        here, plan = False, make_plan(config, gpus(arguments), "bfloat16")
    return {**asdict(plan), "device": "cpu" if here else "gpu"}, "\n".join(plan.lines(here))


def make_plan(config: ClassTrainingConfig, machine: Machine, quick: str) -> Plan:
    """The first number of processes is the one that the config's batch is meant for; the others keep the samples of a step.
    `quick`: what the precision "auto" means on the machine."""
    run, training, assumed = config.run, config.class_patch, []
    tokenizer = config.tokenizer.model
    if folder := folder_here(training.tokenizer):
        tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
    else:
        assumed.append(f"class_patch.tokenizer = {training.tokenizer!r}, whose shape [tokenizer.model] gives, is not here")
    try:
        index = ShardIndex.open(config.data.train, config.data.keep)
        pictures, pixels = len(index), "bits" not in index.entries[0].members
    except OSError as error:
        pictures, pixels = 0, True
        assumed.append(f"the data are not here ({error}); shards of pictures, which are encoded on the way")
    shape = training.shape(tokenizer.bits, training.size // tokenizer.downsampling, _classes(config))
    with torch.device("meta"):
        model, frozen = ClassPatchModel(shape), LFQTokenizer(tokenizer)
    count = {"head": _count(model.head), "network": _count(model) - _count(model.head), "tokenizer (frozen)": _count(frozen)}
    flops = {"network and head": picture_flops(shape), "encoder": 0.0}
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
        passes = _peak(shape, size, precision, training.checkpoint_activations)
        always = states.kept + states.buckets + 4.0 * count["tokenizer (frozen)"]
        encoding = memory.tokenizer_peak(tokenizer, size, training.size, training.size, decode=False) if pixels else 0.0
        most = always + max(states.gathered + passes, encoding, states.step)
        columns.append(
            Column(processes, size, accumulation, seconds / processes / 3600, most, most <= machine.memory * GIB * (1 - RESERVE))
        )
    epochs = run.steps * samples / pictures if pictures else None
    return Plan(shape.to_dict(), count, flops, samples, run.steps, epochs, machine, columns, assumed)


def _classes(config: ClassTrainingConfig) -> int:
    """ValueError where neither the config nor a file says how many."""
    training = config.class_patch
    if training.class_count:
        return training.class_count
    if training.classes:
        return len(read_json(Path(training.classes)))
    raise ValueError("class_patch.class_count is 0, and no classes.json is named; a plan needs the number of classes, give it")


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _peak(shape: ClassPatchConfig, pictures: int, precision: str, recompute: bool) -> float:
    """Bytes that a micro-step of so many pictures takes beside weights, gradients and moments, told by the model's own code on
    tensors without numbers. Linear in the pictures, so that two small batches tell a large one."""

    def one(B: int) -> float:
        with FakeTensorMode():
            model = ClassPatchModel(shape)
            model.checkpoint_layers = model.head.net.grad_checkpointing = recompute
            bits_BChw = torch.ones(B, shape.latent_dim, shape.grid, shape.grid)
            noise = ClassNoise.draw(B, shape, True)
            for parameter in model.parameters():  # gradients are states
                parameter.register_post_accumulate_grad_hook(memory.drop)
            lower = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
            with memory.Live(model.parameters()) as live:
                with lower:
                    loss = model.losses(bits_BChw, torch.zeros(B, dtype=torch.long), noise)["bits"].mean()
                loss.backward()
        return live.most + noise.noise_KPC.nbytes

    two, four = one(2), one(4)
    return two + (pictures - 2) * (four - two) / 2
