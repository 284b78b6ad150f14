"""The plan of a run of recipe 'generator', without weights or data: what trains, on how much, for how long, does it fit."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance.folder.sizes import rule_of_model
from stages.config import TrainingConfig
from stages.data.buckets import Buckets
from stages.data.mixture import Mixture
from stages.plan.companion import Companion
from stages.plan.fit import Column, Subject, column
from stages.plan.flops import Flops, document_flops, encoder_flops
from stages.plan.shape import Count, Shape, count
from stages.plan.workload import Workload


@dataclass(frozen=True)
class Machine:
    """`memory` in GiB and `tflops` (peak, dense bfloat16) of a GPU; `mfu`: the share of the peak that training reaches."""

    processes: tuple[int, ...]
    memory: float = 80.0
    tflops: float = 989.0
    mfu: float = 0.4

    def __post_init__(self) -> None:
        if not self.processes or min(self.processes) < 1 or min(self.memory, self.tflops) <= 0 or not 0 < self.mfu <= 1:
            raise ValueError(
                f"--processes {self.processes}, --gpu-memory {self.memory}, --peak-tflops {self.tflops}, --mfu {self.mfu}: "
                "all must be positive, and the MFU at most 1"
            )


@dataclass(frozen=True)
class Picture:
    """An average picture of one resolution (side of a square in pixels) with its prompt."""

    resolution: int
    share: float
    image_tokens: int
    blocks: int
    tokens: float
    flops: Flops


@dataclass(frozen=True)
class Plan:
    """`flops` by part, `flops_per_step` and `tokens_per_step` are of a step of `samples`; recomputation is not in them. A
    `companion` runs in its first steps only, so `flops_of_run` need not be a multiple of those of a step."""

    stage: str
    precision: str
    parameters: dict[str, Count]
    pictures: list[Picture]
    steps: int
    samples: int
    tokens_per_step: float
    flops: dict[str, float]
    flops_per_step: float
    flops_of_run: float
    recomputed_per_step: float
    machine: Machine
    data: dict[str, Any]
    assumed: list[str]
    columns: list[Column]
    companion: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    config: TrainingConfig,
    machine: Machine,
    caption: int,
    shape: Shape | None = None,
    companion: Companion | None = None,
) -> Plan:
    """`caption`: tokens of a caption. The first number of processes is the one that the config's batch is meant for; the others
    keep the samples of a step. `shape` is that of the model where the config alone does not say it; `companion` runs beside it.

    ValueError where the config does not say enough, or contradicts itself.
    """
    run, training = config.run, config.generator
    shape = shape or Shape.of(config)
    workload = Workload.of(config, shape, caption)
    with FakeTensorMode():
        model = shape.model(training, torch.float32)
        counts = count(model)
    mix = {int(resolution): share for resolution, share in config.data.mix.items()}
    data, pixels = _data(config, mix, Buckets(replace(rule_of_model(model), trained=()), tuple(mix)))
    samples = run.batch_size * run.accumulation * machine.processes[0]

    pictures = []
    for resolution, document in workload.documents.items():
        encoding = encoder_flops(shape.tokenizer, resolution, resolution) if pixels else 0.0
        flops = document_flops(model, document, encoding)
        blocks = document.image // document.P
        pictures.append(Picture(resolution, workload.shares[resolution], document.image, blocks, document.length, flops))
    parts: dict[str, float] = {}
    for picture in pictures:
        for name, value in asdict(picture.flops).items():
            parts[name] = parts.get(name, 0.0) + samples * picture.share * value
    recomputed = parts.pop("recomputed") * training.checkpoint_activations
    of_run = run.steps * sum(parts.values())
    if companion:
        beside = companion.flops(list(workload.documents.values()))
        parts[companion.name] = sum(samples * p.share * flops for p, flops in zip(pictures, beside, strict=True))
        of_run += companion.steps * parts[companion.name]
    per_step = sum(parts.values())

    subject = Subject(config, shape, workload, model.special, counts, pixels, companion)
    seconds = of_run / (machine.mfu * machine.tflops * 1e12)
    columns = [column(subject, n, samples, seconds / n / 3600, machine.memory) for n in machine.processes]
    assumed = [f"captions of {workload.prompt - workload.template} tokens", *(f"{place} is not here" for place in shape.absent)]
    if "absent" in data:
        assumed.append("the data are not here; shards of pictures, which the GPUs encode (shards of bits need no encoder)")
    assumed += companion.assumed if companion else []
    return Plan(
        training.stage or "generator",
        run.precision,
        counts,
        pictures,
        run.steps,
        samples,
        samples * workload.tokens,
        parts,
        per_step,
        of_run,
        recomputed,
        machine,
        data,
        assumed,
        columns,
        _summary(companion) if companion else None,
    )


def _summary(companion: Companion) -> dict[str, Any]:
    said = {name: getattr(companion, name) for name in ("name", "parameters", "passes", "steps", "place", "gpu", "host")}
    return said | {"block_size": companion.shape.head.parallel_num}


def _data(config: TrainingConfig, mix: dict[int, float], buckets: Buckets) -> tuple[dict[str, Any], bool]:
    """What the shards hold, where they can be read, and whether it is pixels that are trained on."""
    from stages.recipes.generator.recipe import open_sources

    try:
        sources = open_sources(config.data)
    except OSError as error:
        return {"absent": str(error)}, True
    mixture = Mixture(sources, config.run.seed, mix, buckets, config.data.enlarge)
    left_out = dict(mixture.unused)
    for source in sources:
        for reason, number in source.data.index.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + number
    data = sources[0].data
    first = next(filter(None, (data.readable(data.shape, number) for number in range(len(data)))), None)
    return {"samples": len(mixture), "hash": mixture.hash, "left_out": left_out}, not (first and first.bits)
