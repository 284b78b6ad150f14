"""On a GPU: the host waits where the tests on the meta device list it, and nowhere else; kernels give what plain code gives.

CUDA itself says when an operation waits (`torch.cuda.set_sync_debug_mode`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from refine_model import class_model, text_model
from test_distill_view import REPEATS, drawn
from tiny_model import BITS, tiny_model

from bitdance.generate import generate_bits
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import SAMPLERS
from bitdance.heads.diffusion.settings import Sampling
from bitdance.kinds.refine.pipeline import RefinePipeline
from bitdance.kinds.refine.settings import RefineSettings
from bitdance.model import BitDanceModel
from bitdance.sequence.batch import TrainingBatch, build_batch
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.config import GeneratorTraining
from stages.recipes.generator.documents import GeneratorBatch
from stages.recipes.generator.objective import GeneratorObjective

pytestmark = pytest.mark.gpu
PROMPTS = ["a red cube", "a blue ball on a table"]


@contextmanager
def waits() -> Iterator[list[str]]:
    """What CUDA says of operations inside for which the host waits."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [f"{w.filename}:{w.lineno}" for w in said if "synchronizing CUDA operation" in str(w.message)]


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def packed(model: BitDanceModel) -> TrainingBatch:
    documents = [document.pieces for document in drawn(model)]
    return build_batch(documents, model.patch_side, model.special, token_budget=256, multiple_of=128)


@pytest.mark.parametrize("compiled", [False, None], ids=["plain", "graphs"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_picture_waits_for_its_device_before_the_loop_and_at_its_end(sampler: str, compiled: bool | None) -> None:
    model, sampling = tiny_model().cuda(), Sampling(3, 3.0, sampler)
    sample = BlockSampler(model.head, compiled)
    generate_bits(model, PROMPTS, 8, 8, sampling, seeded(2), block_sampler=sample)  # compiles and records
    with waits() as found:
        generate_bits(model, PROMPTS, 8, 8, sampling, seeded(2), block_sampler=sample)
    # ids and padding of the prompts, two lists of places; whether there was a NaN
    assert len(found) <= 5, found


@pytest.mark.parametrize("attention", ["dense", "flex"])
def test_a_training_step_waits_for_nothing(attention: str) -> None:
    model = tiny_model(P=4, diff_batch_mul=REPEATS).cuda().train()
    module = GeneratorObjective(model, GeneratorTraining(attention=attention))
    batch = GeneratorBatch(packed(model), {}).to("cuda")
    module(batch, torch.Generator(), 0)[0].backward()  # compiles
    with waits() as found:
        module(batch, torch.Generator(), 1)[0].backward()
    assert found == []


@pytest.mark.parametrize("strips", [False, True])
def test_decoding_waits_for_nothing(strips: bool) -> None:
    config = TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=BITS)
    tokenizer = LFQTokenizer(config).cuda().eval()
    bits = torch.ones(1, BITS, 32, 16, device="cuda")
    with torch.no_grad():
        whole = tokenizer.decode(bits, strips=False)
        with waits() as found:
            made = tokenizer.decode(bits, strips=strips)
    torch.testing.assert_close(made, whole, rtol=1e-3, atol=1e-3)
    assert found == []


def test_flex_on_a_gpu_is_dense_attention_losses_and_gradients() -> None:
    """On rows of several of flex's blocks."""
    results = []
    for attention in ("dense", "flex"):
        model = tiny_model(P=4, diff_batch_mul=REPEATS).cuda().train()
        losses = model(packed(model).to("cuda"), attention=attention)
        losses.total.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((losses.total.detach(), torch.cat(grads)))
    (dense, dense_grad), (flex, flex_grad) = results
    torch.testing.assert_close(flex, dense, rtol=2e-3, atol=2e-3)
    assert float((flex_grad - dense_grad).norm() / dense_grad.norm()) < 0.02


def test_bits_on_a_gpu_are_those_of_the_cpu() -> None:
    """In float32, for the same seeds: rounding turns hardly a sign."""
    sampling, bits = Sampling(4, 3.0), []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        bits.append(generate_bits(model, PROMPTS, 8, 8, sampling, seeded(2)).cpu())
    assert float((bits[0] != bits[1]).float().mean()) < 0.05


@pytest.mark.parametrize("make", [class_model, text_model])
def test_refinement_on_a_gpu_is_that_of_the_processor_up_to_rounding(make) -> None:
    conditions = [0, 1, 2] if make is class_model else ["a red cube", "a blue ball on a table", "a"]
    pipe, tokens = RefinePipeline(make()), []
    for device in ("cpu", "cuda"):
        pipe.to(device)
        s = pipe.model.tokenizer.downsampling
        tokens.append(pipe.generate(conditions, 4 * s, 4 * s, RefineSettings(6, 2.0, 1.0), seeded(3)).cpu())
    assert (tokens[0] == tokens[1]).float().mean() > 0.98


def test_recorded_scales_are_those_of_the_network() -> None:
    from scale_cases import var_network, var_tokenizer

    from bitdance.kinds.next_scale.generate import condition_of, generate_tokens, own_draws
    from bitdance.kinds.next_scale.graphs import ScaleGraphs
    from bitdance.kinds.next_scale.settings import NextScaleSettings

    network, quantizer = var_network("var").cuda().eval(), var_tokenizer().quantize.cuda()
    graphs, settings = ScaleGraphs(network), NextScaleSettings()
    for number, classes in enumerate(([1, 2], [2, 0], [0, 1])):  # the first run warms up, the second records, the third replays
        made = [
            generate_tokens(
                network, quantizer, condition_of(network, None, classes, True), list(network.config.sides), settings,
                own_draws(seeded(2)), 2, graphs=used,
            ).total
            for used in (graphs, None)
        ]  # fmt: skip
        torch.testing.assert_close(*made, rtol=0, atol=1e-4, msg=f"run {number}")
