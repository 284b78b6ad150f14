"""At the published 14B shape, on the meta device: what `bitdance bench` and `--dry-run` compute is what the code does.

Runs of the code itself are counted operation by operation, with all 40 layers; further cases, where layers are alike, with four.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from meta_counts import Counts, fused_attention
from meta_device import MetaDevice
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from bitdance.bench.models import bare_model
from bitdance.costs.shapes import SHAPES
from bitdance.costs.work import Generation, Work, work
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import SAMPLERS
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.sequence.batch import TrainingBatch
from bitdance.sequence.noise import ImageNoise
from bitdance.sequence.prompt import conditional_ids, unconditional_ids
from stages.config import TrainingConfig, load_config
from stages.engine.ema import AveragedAdamW
from stages.plan import memory
from stages.plan.flops import document_flops
from stages.plan.shape import Shape
from stages.plan.workload import KERNEL_ROWS, Workload

pytestmark = pytest.mark.slow

PROMPT = "a fox in the snow, watercolour"
PRETRAIN = str(Path(__file__).parent.parent / "configs/14b/pretrain.toml")


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def generated(name: str, layers: int, size: tuple[int, int], sampling: Sampling, batch: int) -> tuple[Counts, dict[str, Work]]:
    """What making `batch` pictures costs by phase, once times are embedded: counted, and as bench has it."""
    shape, counts = SHAPES[name], Counts()
    shape = dataclasses.replace(shape, backbone={**shape.backbone, "num_hidden_layers": layers})
    model = bare_model(shape).to(torch.bfloat16)
    sample, (h, w) = BlockSampler(model.head), (side // 16 for side in size)
    arguments = model, [PROMPT] * batch, h, w, sampling
    with MetaDevice():
        for t in sampling_times(sampling):
            sample._forget_old()
            sample._time(t)
        counts.follow(model)
        with fused_attention(counts), counts:
            generate_bits(*arguments, seeded(batch), block_sampler=sample)
    text = len(conditional_ids(model.text_tokenizer, PROMPT)), len(unconditional_ids(model.text_tokenizer))
    return counts, work(shape, Generation(*size, batch, sampling, text, 2))


def sampling_times(sampling: Sampling) -> list[float]:
    """At which the head is asked."""
    times: list[float] = []
    nothing = torch.zeros(1, 1, 1)

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    SAMPLERS[sampling.sampler](velocity, nothing, sampling.steps, lambda: nothing, 1.0)
    return times


@pytest.mark.parametrize(
    ("name", "layers", "size", "sampling", "batch"),
    [
        ("14b-64x", 40, (128, 256), Sampling(3), 1),
        ("14b-64x", 4, (256, 256), Sampling(4, 7.5, "dpmpp_2m_sde", (0.3, 0.7)), 3),
        ("14b-16x", 4, (64, 128), Sampling(2, 1.0, "heun"), 1),
    ],
    ids=str,
)
def test_operations_bytes_and_kernels_of_a_picture_are_those_of_bench(
    name: str, layers: int, size: tuple[int, int], sampling: Sampling, batch: int
) -> None:
    counts, found = generated(name, layers, size, sampling, batch)
    for phase in ("prefill", "llm", "head", "projector"):
        assert counts.flops[phase] == found[phase].flops, phase
        assert counts.products[phase] == found[phase].kernels, phase
        # with a mask, keys and values of the prefix are repeated for every query head that shares them
        assert counts.bytes[phase] == pytest.approx(found[phase].bytes, rel=0.01 * batch if phase == "prefill" else 1e-9), phase
    calls = SHAPES[name].blocks(*size) - 1
    # each takes the host some microseconds: with the head's graph queued behind them they cost nothing while they are so few
    assert counts.launches["llm"] / calls <= 64 * layers + 24 and counts.launches["projector"] / calls <= 8


def test_operations_and_bytes_of_decoding_are_those_of_bench() -> None:
    shape, counts = SHAPES["14b-64x"], Counts()
    model = bare_model(shape).to(torch.bfloat16)
    bits = torch.ones(1, 32, 64, 64, device="meta", dtype=torch.bfloat16)
    counts.phase = "decode"
    assert model.tokenizer is not None
    with torch.no_grad(), counts:
        model.tokenizer.decode(bits, strips=False)
    found = work(shape, Generation(1024, 1024, 1, Sampling(), (49, 11), 2))["decode"]
    assert counts.flops["decode"] == found.flops and counts.products["decode"] == found.kernels
    assert counts.bytes["decode"] == pytest.approx(found.bytes, rel=0.01)


# training


@pytest.fixture(scope="module")
def pretraining() -> tuple[TrainingConfig, Shape, Workload]:
    config = load_config(PRETRAIN)
    shape = Shape.of(config)
    return config, shape, Workload.of(config, shape, 60)


def prepared(config: TrainingConfig, shape: Shape, workload: Workload, layers: int) -> tuple[BitDanceModel, TrainingBatch]:
    """The model with so many layers and the fullest micro-step of the config, packed rows with draws, both on meta. Gradients
    go as they come: they are states, not activations."""
    with torch.device("meta"):
        model = shape.model(config.generator, torch.bfloat16, layers)
    model.tokenizer = None
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(memory.drop)
    batch = workload.batch(workload.fullest(config.run.batch_size), model.special, shape.head.ch_target, KERNEL_ROWS)
    batch.noise = ImageNoise.draw(len(batch.image_bits_NC), shape.head, 0.1, torch.Generator().manual_seed(0))
    return model, batch.to("meta")


def test_operations_and_memory_of_a_training_step_are_those_of_the_plan(
    pretraining: tuple[TrainingConfig, Shape, Workload],
) -> None:
    config, shape, workload = pretraining
    model, batch = prepared(*pretraining, 40)
    counts, inputs = Counts(), sum(tensor.nbytes for tensor in memory._tensors(batch))
    # operations of attention depend on the mask; test_plan.py compares them
    with fused_attention(), memory.Live([*model.parameters(), *model.buffers()]) as live, counts:
        loss = model(batch, attention="flex", text_weight=config.generator.text_weight).total
        kept = live.now + inputs
        loss.backward()
    resolutions = workload.fullest(config.run.batch_size)
    documents = [dataclasses.replace(workload.documents[r], text=float(workload.prompt)) for r in resolutions]
    each = [document_flops(model, document) for document in documents]
    # the plan counts tokens, the step computes padding too
    padding = batch.ids_BL.numel() / sum(document.length for document in documents) - 1
    assert 0 <= padding < 0.05
    head = shape.head
    in_head = 4 * head.depth_latent * head.parallel_num * head.ch_latent * head.diff_batch_mul  # attention, of a token and pass
    attention = sum(flops.attention / 3 for flops in each) + in_head * sum(document.image for document in documents)
    padded = padding * sum(flops.layers / 3 for flops in each)
    passes = 4  # forward, once more, and two in the backward pass
    expected = sum(flops.useful + flops.recomputed for flops in each) + passes * (padded - attention)
    assert counts.flops[""] == pytest.approx(expected, rel=0.01)

    batch_on_host = workload.batch(resolutions, model.special, shape.head.ch_target, KERNEL_ROWS)
    planned = memory.activations(shape, config.generator, config.run.precision, batch_on_host, dense=False)
    assert planned.kept == pytest.approx(kept, rel=0.01)
    assert planned.most == pytest.approx(live.most + inputs, rel=0.05)


def test_torchs_own_memory_tracker_sees_the_peak_of_the_plan(pretraining: tuple[TrainingConfig, Shape, Workload]) -> None:
    """It is slow, so with three layers."""
    config, shape, workload = pretraining
    model, batch = prepared(*pretraining, 3)
    tracker = MemTracker()
    tracker.track_external(model)
    with fused_attention(), tracker:
        model(batch, attention="flex", text_weight=config.generator.text_weight).total.backward()
    peak = {str(kind): number for kind, number in tracker.get_tracker_snapshot("peak")[torch.device("meta")].items()}
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    inputs = sum(tensor.nbytes for tensor in memory._tensors(batch))
    small = dataclasses.replace(shape, backbone={**shape.backbone, "num_hidden_layers": 3})
    on_host = workload.batch(workload.fullest(config.run.batch_size), model.special, shape.head.ch_target, KERNEL_ROWS)
    planned = memory.activations(small, config.generator, config.run.precision, on_host, dense=False)
    assert planned.most == pytest.approx(peak["Total"] - weights + inputs, rel=0.05)


def test_states_are_those_that_the_optimiser_makes(pretraining: tuple[TrainingConfig, Shape, Workload]) -> None:
    config, shape, _ = pretraining
    with torch.device("meta"):
        model = shape.model(config.generator, torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = AveragedAdamW([{"params": trained}], 0.9, foreach=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    adam.step()
    made = sum(t.nbytes for state in adam.state.values() for t in state.values() if isinstance(t, Tensor) and t.is_meta)
    numbers = sum(p.numel() for p in trained)
    one = dataclasses.replace(config.deepspeed, zero_stage=0)
    planned = memory.states(numbers, 0, max(p.numel() for p in trained), "float32", True, one, 1)
    assert made == pytest.approx(planned.optimizer + planned.average, rel=1e-6)
    assert planned.weights == planned.gradients == 4 * numbers
