"""Memory of one process: what training keeps between steps, and what one step takes on top.

The states follow from how DeepSpeed 0.19 lays them out. What a step takes is not put down in formulas: the model's own code
runs on tensors that have shapes and no data, and the sizes of the storages alive are added up. `python -m stages.measure.memory`
compares both with real runs.
"""

import dataclasses
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitdance.model import BitDanceModel
from bitdance.sequence.batch import TrainingBatch
from bitdance.sequence.noise import ImageNoise
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig, build_tokenizer
from stages.config import DeepSpeedConfig, GeneratorTraining
from stages.plan.shape import Shape


@dataclass(frozen=True)
class States:
    """Bytes of one process. `step` is taken during the optimiser's step alone, `gathered` and `buckets` while gradients are made.

    `host` are the bytes that offloading moves to the machine's own memory.
    """

    weights: float
    gradients: float
    optimizer: float  # moments, and float32 weights where training holds others
    average: float
    buckets: float
    gathered: float
    step: float
    host: float

    @property
    def kept(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average


def weight_bytes(precision: str) -> int:
    return 2 if precision == "bfloat16-weights" else 4


def states(
    trained: int, frozen: int, largest: int, precision: str, average: bool, deepspeed: DeepSpeedConfig, processes: int
) -> States:
    """`trained` and `frozen` parameters, of which the `largest` tensor has so many numbers, under `processes` processes."""
    stage, zero = deepspeed.zero_stage, deepspeed.settings.get("zero_optimization", {})
    width = weight_bytes(precision)
    part = trained / processes if stage else float(trained)  # of the optimiser's states
    weights = width * (trained + frozen) / (processes if stage == 3 else 1)
    gradients = 4 * (trained if stage < 2 else trained / processes)
    # ZeRO 1 and 2 keep float32 weights of their part in any case, ZeRO 3 only beside others
    master = 4 * part if stage in (1, 2) or (stage == 3 and width == 2) else 0.0
    optimizer, averaged = 8 * part + master, 4 * part if average else 0.0
    # gradients as they come, and under ZeRO 3 this process's part of them on its way to the float32 sum
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), trained) if stage >= 2 or (stage and processes > 1) else 0
    buckets = float(width * bucket) + (bucket * (2 + 4 if width == 2 else 4) / processes if stage == 3 else 0.0)
    live = max(largest, min(trained + frozen, int(zero.get("stage3_max_live_parameters", 1e9))))
    gathered = float(width * live) if stage == 3 and (processes > 1 or deepspeed.offload_parameters) else 0.0
    step = 4 * min(part, float(zero.get("sub_group_size", 1e9)) if stage == 3 else part) if stage else 0.0
    host = 0.0
    if deepspeed.offload_optimizer:
        host, gradients = optimizer + averaged + gradients, gradients if stage == 1 else 0.0
        optimizer = averaged = step = 0.0
    if deepspeed.offload_parameters:
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, averaged, buckets, gathered, step, host)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-step needs beside the states: `kept` for the backward pass, at most `most` at one time."""

    kept: float
    most: float


class Live(TorchDispatchMode):
    """Adds up the storages that tensors made inside hold: `now` and, at its peak, `most`. `known` tensors do not count."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def activations(shape: Shape, training: GeneratorTraining, precision: str, batch: TrainingBatch, dense: bool) -> Activations:
    """Of one micro-step on `batch`. `dense`: attention with a dense mask, as on a CPU; else by a kernel that needs none.

    Layers are alike, so that the sum over all of them follows from two and from three.
    """
    layers = int(shape.backbone["num_hidden_layers"])
    if layers <= 3:
        return _micro_step(shape, training, precision, batch, dense, layers)
    two, three = (_micro_step(shape, training, precision, batch, dense, n) for n in (2, 3))
    more = layers - 2
    return Activations(two.kept + more * (three.kept - two.kept), two.most + more * (three.most - two.most))


def _micro_step(
    shape: Shape, training: GeneratorTraining, precision: str, batch: TrainingBatch, dense: bool, layers: int
) -> Activations:
    fake = FakeTensorMode()
    on_device = _fake_batch(batch, shape, fake)
    with fake:
        model = shape.model(training, torch.bfloat16 if precision == "bfloat16-weights" else torch.float32, layers)
        if not dense:
            model.hidden = _without_mask.__get__(model)  # type: ignore[method-assign]
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients are states
                parameter.register_post_accumulate_grad_hook(drop)
        lower = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
        with _no_table(), Live([*model.parameters(), *model.buffers()]) as live:
            with lower:
                loss = model(on_device, text_weight=training.text_weight).total
            kept = live.now
            loss.backward()
    inputs = sum(t.nbytes for t in _tensors(on_device))
    return Activations(kept + inputs, live.most + inputs)


def forward_peak(shape: Shape, batch: TrainingBatch, dtype: torch.dtype, dense: bool) -> float:
    """Bytes at the peak of predicting the pictures of `batch` without gradients, beside weights and batch, however many layers
    there are."""
    fake = FakeTensorMode()
    on_device = _fake_batch(batch, shape, fake)
    with fake, torch.no_grad():
        model = shape.model(GeneratorTraining(), dtype, layers=1)
        if not dense:
            model.hidden = _without_mask.__get__(model)  # type: ignore[method-assign]
        no_text = dataclasses.replace(on_device, label_ids_T=on_device.label_ids_T[:0])
        with _no_table(), Live([*model.parameters(), *model.buffers()]) as live:
            model(no_text)
    return float(live.most)


def _no_table() -> Any:
    """The table of places is kept from batch to batch, and must not be one without numbers; zeros take as much room."""
    return patch("bitdance.model.sincos_2d", lambda row, col, dim, dtype, side: torch.zeros(*row.shape, dim, dtype=dtype))


def _without_mask(
    self: BitDanceModel, batch: TrainingBatch, generator: Any = None, flip_max: float = 0.0, attention: str = ""
) -> Tensor:
    """`BitDanceModel.hidden` as far as memory goes: a fused kernel keeps neither mask nor scores, whatever its mask."""
    return self.backbone(self.inputs(batch, generator, flip_max), position_BL=batch.position_BL)


def drop(parameter: Tensor) -> None:
    """A hook for parameters whose gradients are counted elsewhere."""
    parameter.grad = None


def _fake_batch(batch: TrainingBatch, shape: Shape, fake: FakeTensorMode) -> TrainingBatch:
    """The shapes of `batch`, with its draws. All its image tokens are generated ones."""
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "noise"}
    N, head = batch.image_bits_NC.shape[0], shape.head
    assert len(batch.generated_K) == N
    blocks = N // head.parallel_num
    made = {name: fake.from_tensor(part) if isinstance(part, Tensor) else part for name, part in parts.items()}
    with fake:
        draws = ImageNoise(
            torch.empty(N, head.ch_target, dtype=torch.bool),
            torch.empty(head.diff_batch_mul, blocks),
            torch.empty(head.diff_batch_mul, blocks, head.parallel_num, head.ch_target),
        )
        return TrainingBatch(**made, noise=draws)


def _tensors(batch: TrainingBatch) -> list[Tensor]:
    return [part for part in vars(batch).values() if isinstance(part, Tensor)] + list(vars(batch.noise).values())


def tokenizer_peak(config: PictureTokenizerConfig, pictures: int, height: int, width: int, decode: bool) -> float:
    """Bytes at the peak of encoding (or decoding) so many pictures at once in float32, inputs included, weights not."""
    with FakeTensorMode(), torch.no_grad():
        tokenizer = build_tokenizer(config)
        s = config.stride
        shown = (
            torch.empty(pictures, config.latents, height // s, width // s) if decode else torch.empty(pictures, 3, height, width)
        )
        half: Any = tokenizer.decoder if decode else tokenizer.encoder
        more = (torch.empty_like(shown),) if decode and config.gan_decoder else ()
        with Live(tokenizer.parameters()) as live:
            half(shown, *more)
    return live.most + shown.nbytes * (1 + len(more))


def cache_bytes(shape: Shape, rows: int, tokens: int, width: int) -> int:
    """Keys and values of `rows` sequences in numbers of `width` bytes."""
    b = shape.backbone
    heads = int(b.get("num_key_value_heads") or b["num_attention_heads"])
    head_dim = int(b.get("head_dim") or b["hidden_size"] // b["num_attention_heads"])
    return rows * tokens * 2 * int(b["num_hidden_layers"]) * heads * head_dim * width
