"""On the meta device every loop runs as on a GPU, and the host reads of it only what each test lists.

What reads nothing leaves the device its queue of work. Left out is what only CUDA has: compiled kernels, recorded graphs,
autocast.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from meta_device import MetaDevice
from test_distill_view import REPEATS, drawn, view_of
from tiny_model import BITS, tiny_model
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from bitdance import BitDancePipeline
from bitdance.bench.models import bare_model
from bitdance.bench.plain import generate_plain
from bitdance.folder.config import ModelConfig
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.heads.diffusion.sampler import SAMPLERS
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.sequence import positions
from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from distill.config import DistillTraining, Objectives
from distill.documents import DistillBatch
from distill.growth import grow
from distill.objective import DistillObjective
from distill.teacher import Teacher
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.config import AdversaryTraining, GeneratorTraining, TokenizerTraining
from stages.engine.ema import AveragedAdamW
from stages.recipes.generator.documents import GeneratorBatch
from stages.recipes.generator.objective import GeneratorObjective
from stages.recipes.generator.validation import heldout_losses
from stages.recipes.tokenizer.adversary import Adversary
from stages.recipes.tokenizer.objective import objective_of

pytestmark = pytest.mark.slow

PROMPTS = ["a red cube", "a blue ball on a table"]
BINARIZE = "lfq_tokenizer/binary.py:check_lost"  # is there a NaN among what became bits?
PICTURES = TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=BITS)  # 4 × 4 pixels a token
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 2048,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
SHAPE = ModelConfig("tiny", QWEN3, HeadConfig(BITS, 32, 128, 1, 1, 4), PICTURES, (32, 32))


@pytest.fixture(autouse=True)
def first_use() -> Iterator[None]:
    """Tables of positions that an earlier test left on the device are not counted on."""
    positions._sincos_1d.cache_clear()
    yield


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def on_meta(*changes: Any, **named: Any) -> BitDanceModel:
    return tiny_model(*changes, **named).to("meta")


# what the device itself does


def test_the_device_refuses_what_a_gpu_would_and_counts_what_it_waits_for() -> None:
    x = torch.zeros(3, device="meta")
    with MetaDevice() as device:
        assert int(x.sum()) == 0 and x.tolist() == [0.0, 0.0, 0.0] and not bool((x > 0).any()) and not x.cpu().any()
        torch.arange(3).to("meta")
        torch.arange(3.0) + 1
        x * torch.tensor(2.0)  # a number travels with the call
        with pytest.raises(RuntimeError, match="of the device and of the host"):
            x + torch.arange(3)
        with pytest.raises((RuntimeError, NotImplementedError), match="nonzero"):
            x[x > 0]
    assert (device.reads.total(), device.copies.total()) == (4, 1)


# generation


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_picture_is_read_once_at_its_end(sampler: str, guidance: float) -> None:
    model, sampling, done = on_meta(), Sampling(2, guidance, sampler), []
    with MetaDevice() as device:
        bits = generate_bits(model, PROMPTS, 4, 6, sampling, seeded(2), lambda m, M, bits: done.append((m, bits.device.type)))
    assert bits.shape == (2, BITS, 4, 6) and bits.is_meta and done == [(m, "meta") for m in range(1, 7)]
    assert device.reads == {BINARIZE: 1}
    assert device.copies == {
        "bitdance/generate.py:__init__": 2,  # ids and padding of the prompts
        "bitdance/sequence/patches.py:coordinates": 1,
        "bitdance/sequence/positions.py:_sincos_1d": 1,  # kept for all pictures
        "bitdance/loop.py:_to": 6,  # a block's draws, from the host's generators, pinned on CUDA
    }


def test_intervals_of_guidance_and_fewer_steps_read_nothing_more() -> None:
    model, sampling = on_meta(), Sampling(4, 3.0, "dpmpp_2m_sde", (0.3, 0.7), last_steps=2)
    with MetaDevice() as device:
        generate_bits(model, PROMPTS, 4, 4, sampling, seeded(2))
    assert device.reads == {BINARIZE: 1}


def test_with_generators_of_the_device_nothing_is_sent_in_the_loop() -> None:
    """`torch.Generator` knows no meta device, so the draws are given."""
    model = on_meta()
    with MetaDevice() as device:
        noise = lambda: torch.empty(2, 4, BITS, device="meta")  # noqa: E731
        generate_bits(model, PROMPTS, 4, 4, Sampling(2, 3.0), seeded(2), noise=noise)
    assert "bitdance/loop.py:_to" not in device.copies and device.reads == {BINARIZE: 1}


def test_the_yardstick_reads_nothing() -> None:
    model = on_meta()
    with MetaDevice() as device:
        generate_plain(model, PROMPTS[0], 4, 4, 2, 3.0, seeded(1))
    assert not device.reads


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("generative", [False, True])
def test_a_picture_is_decoded_without_a_read(strips: bool, generative: bool) -> None:
    with torch.device("meta"):
        tokenizer = LFQTokenizer(dataclasses.replace(PICTURES, gan_decoder=generative))
    bits = torch.ones(1, BITS, 16, 8, device="meta")
    with torch.no_grad(), MetaDevice() as device:
        image = tokenizer.decode(bits, seeded(1)[0], strips=strips)
        latent = tokenizer.encode(image)
    assert image.shape == (1, 3, 64, 32) and latent.shape == bits.shape
    assert device.reads == {BINARIZE: 1}, "the encoder's bits are looked at for NaNs"
    assert device.copies == ({"lfq_tokenizer/tokenizer.py:decode": 1} if generative else {}), "its noise, if any"


def test_from_prompt_to_pixels_the_host_reads_nans_and_the_picture() -> None:
    pipe = BitDancePipeline(bare_model(SHAPE))
    pipe.set_progress_bar_config(disable=True)
    with MetaDevice() as device:
        pictures = pipe(PROMPTS, 32, 32, num_inference_steps=2, seed=0).images
    assert isinstance(pictures, list) and [picture.size for picture in pictures] == [(32, 32)] * 2
    finite = "bitdance/coding.py:decode_tensor"  # is there a NaN among what the decoder gave?
    assert device.reads == {BINARIZE: 1, finite: 1, "bitdance/picture.py:to_pil": 1}


# training


def packed(model: BitDanceModel, **changes: Any) -> Any:
    documents = drawn(model)
    return build_batch([document.pieces for document in documents], model.patch_side, model.special, **changes)


def flex_stand_in(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, **options: Any) -> Tensor:
    """flex_attention refuses meta tensors; its mask is made on the device all the same."""
    assert block_mask.kv_indices.is_meta and options.pop("enable_gqa")
    return scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("rows", [{}, {"token_budget": 260, "multiple_of": 1}], ids=["padded", "packed"])
def test_a_training_step_reads_nothing(attention: str, rows: dict[str, int]) -> None:
    model = on_meta(P=4, diff_batch_mul=REPEATS).train()
    batch = GeneratorBatch(packed(model, **rows), {})
    module = GeneratorObjective(model, GeneratorTraining(attention=attention))
    adam = AveragedAdamW(module.parameters(), 0.9, foreach=True, capturable=False)
    with MetaDevice() as device, patch("bitdance.networks.attention.flex_attention", flex_stand_in):
        on_device = batch.to("meta")
        sent = device.copies.total()
        for step in range(2):
            loss, scalars, _ = module(on_device, torch.Generator(), step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            adam.step()
    assert loss.is_meta and all(value.is_meta for value in scalars.values())
    assert not device.reads
    assert sent == 13 + 3, "every tensor of the batch and its draws, once"
    assert device.copies.total() == sent + 1, "and the table of positions, for the whole run"


def test_a_step_on_mixed_documents_reads_nothing() -> None:
    """Pictures that are read beside pictures that are drawn, text behind them, no draws ahead, fresh flips and noise."""
    model = on_meta().train()
    bits = torch.ones(BITS, 4, 4)
    documents = [
        [TextPiece([5] * 9, predict=True), ImagePiece(bits), TextPiece([6] * 3)],
        [ImagePiece(bits, generated=False), TextPiece([7] * 4, predict=True), ImagePiece(torch.ones(BITS, 2, 6))],
        [TextPiece([5] * 3, predict=True)],
    ]
    batch = build_batch(documents, 2, model.special, token_budget=90)
    with MetaDevice() as device:
        model(batch.to("meta")).total.backward()
    assert not device.reads


def test_pixels_are_encoded_with_one_read_for_each_size() -> None:
    model = on_meta(P=4, diff_batch_mul=REPEATS)
    with torch.device("meta"):
        model.tokenizer = LFQTokenizer(PICTURES)
    batch = packed(model, token_budget=260, multiple_of=1)
    pixels = {k: torch.zeros(3, 4 * h, 4 * w, dtype=torch.uint8) for k, (h, w) in enumerate(((8, 8), (4, 8), (8, 12)))}
    module = GeneratorObjective(model, GeneratorTraining())
    with MetaDevice() as device:
        module(GeneratorBatch(batch, pixels).to("meta"), torch.Generator(), 0)[0].backward()
    assert device.reads == {BINARIZE: 3}, "NaNs among the latents"


def test_validation_reads_all_its_figures_at_once() -> None:
    model = on_meta(P=4, diff_batch_mul=REPEATS)
    objective, documents = GeneratorObjective(model, GeneratorTraining()), drawn(model)

    class Judged:
        """Three held-out pictures of two resolutions."""

        sources = (type("Source", (), {"data": None}),)
        resolutions = (16, 16, 32)

        def __len__(self) -> int:
            return 3

        def at(self, slot: int) -> Any:
            return type("Place", (), {"resolution": self.resolutions[slot], "number": slot})

    class Documents:
        def plain(self, data: Any, place: Any, generator: Any) -> Any:
            return documents[place.number]

        def batch(self, members: Any) -> GeneratorBatch:
            return GeneratorBatch(build_batch([d.pieces for d in members], 2, model.special), {})

    with MetaDevice() as device:
        found = heldout_losses(objective, Documents(), Judged())  # type: ignore[arg-type]
    assert list(found) == ["vision", "text", "bit_accuracy", "vision/16", "vision/32"]
    assert device.reads == {"stages/recipes/generator/validation.py:heldout_losses": 1}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_a_step_of_distillation_reads_nothing(guided: bool, cached: bool) -> None:
    """With a teacher beside the student, once more without prompts, or with what it said before."""
    teacher, student = tiny_model(P=4, diff_batch_mul=REPEATS), grow(tiny_model(P=4, seed=1, diff_batch_mul=REPEATS), 4)
    view, batch = view_of(student, teacher, drawn(student), 260)
    views = [] if cached else [view] * (1 + guided)
    targets = torch.zeros_like(batch.noise.noise_SMPC) if cached else None
    training = DistillTraining(teacher="t", objectives=Objectives(1.0, 1.0, 0.5), samples=("s",), fade_steps=10)
    made = DistillObjective(student.to("meta"), GeneratorTraining(), training, 4, Teacher(teacher.to("meta"), 3.0))
    with MetaDevice() as device:
        on_device = DistillBatch(batch, {}, views, targets).to("meta")
        device.copies.clear()
        loss, scalars, _ = made(on_device, torch.Generator(), 1)
        loss.backward()
    assert scalars["pull"].is_meta and not device.reads
    assert device.copies.total() == 1, "the table of positions"


@pytest.mark.parametrize("generative", [False, True])
def test_a_step_of_the_tokenizer_reads_only_whether_a_latent_is_a_number(generative: bool, tmp_path: Path) -> None:
    """With discriminator and two optimisers; a generative decoder's noise comes from the host's generator."""
    config = TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, gan_decoder=generative)
    training = TokenizerTraining(model=config, groups=2, adversary=AdversaryTraining(weight=0.1, ch=32, layers=1))
    with torch.device("meta"):
        adversary = Adversary(training.adversary)
        module = objective_of(LFQTokenizer(config), training, adversary=adversary)
        images = torch.empty(2, 3, 16, 16)
    learners = [AveragedAdamW(part.parameters(), 0.9, foreach=True) for part in (module, adversary)]
    with MetaDevice() as device:
        loss, scalars, made = module(images, torch.Generator(), 0)
        against, _ = adversary(images, made)
        for value, learner in zip((loss, against), learners, strict=True):
            value.backward()
            learner.step()
    assert "adversarial" in scalars and made.shape == images.shape
    assert device.reads == {BINARIZE: 1}
    assert device.copies == ({"stages/recipes/tokenizer/objective.py:reconstructed": 1} if generative else {})
