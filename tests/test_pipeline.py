"""The user contract: what goes in, what comes out, and what is refused before any work."""

import math
import sys

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from PIL import Image

import bitdance.pipeline
from bitdance import BitDanceModel, BitDancePipeline
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.settings import Sampling
from bitdance.picture import to_uint8
from lfq_tokenizer import LFQTokenizer, TokenizerConfig

SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def pipe():
    return BitDancePipeline.from_pretrained(GOLDEN / "t2i_ckpt", device="cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_one_prompt_gives_one_picture(pipe):
    out = pipe("a red cube", **SMALL, seed=3)
    assert isinstance(out.images, list) and isinstance(out.images[0], Image.Image) and len(out.images) == 1
    assert out.images[0].size == (48, 32) and out.images[0].mode == "RGB"
    assert out.bits.shape == (1, 8, 4, 6) and set(out.bits.unique().tolist()) == {-1.0, 1.0}
    assert out.seeds == [3]


def test_every_output_type_shows_the_same_picture(pipe):
    outs = {kind: pipe(["a", "b"], **SMALL, seed=3, output_type=kind) for kind in ("pil", "np", "pt", "bits")}
    for out in outs.values():
        assert torch.equal(out.bits, outs["pil"].bits)
    assert outs["bits"].images is None
    array, tensor = outs["np"].images, outs["pt"].images
    assert array.shape == (2, 32, 48, 3) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
    assert tensor.shape == (2, 3, 32, 48) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    for picture, values in zip(outs["pil"].images, array, strict=True):
        assert np.abs(np.asarray(picture) - 255 * values).max() <= 1


def test_one_seed_counts_up_over_the_pictures(pipe):
    out = pipe(["a red cube", "x"], **SMALL, num_images_per_prompt=2, seed=7, output_type="bits")
    assert out.seeds == [7, 8, 9, 10]
    for i, prompt in enumerate(["a red cube", "a red cube", "x", "x"]):
        assert torch.equal(pipe(prompt, **SMALL, seed=7 + i, output_type="bits").bits[0], out.bits[i])


def test_a_list_of_seeds_and_a_list_of_generators_are_the_same(pipe):
    by_seed = pipe(["a", "b"], **SMALL, seed=[5, 2], output_type="bits")
    by_generator = pipe(["a", "b"], **SMALL, generator=[seeded(5), seeded(2)], output_type="bits")
    assert torch.equal(by_seed.bits, by_generator.bits)
    assert by_generator.seeds == [None, None]


def test_one_generator_serves_one_picture_directly_and_draws_seeds_for_more(pipe):
    assert torch.equal(pipe("a", **SMALL, generator=seeded(5)).bits, pipe("a", **SMALL, seed=5).bits)
    out = pipe(["a", "b"], **SMALL, generator=seeded(5), output_type="bits")
    assert out.seeds == torch.randint(0, 2**63 - 1, (2,), generator=seeded(5)).tolist()
    assert torch.equal(pipe("b", **SMALL, seed=out.seeds[1]).bits[0], out.bits[1])


def test_no_seed_draws_fresh_ones_that_make_the_picture_again(pipe):
    first, second = (pipe("a", **SMALL, output_type="bits") for _ in range(2))
    assert first.seeds != second.seeds and not torch.equal(first.bits, second.bits)
    assert torch.equal(pipe("a", **SMALL, seed=first.seeds[0]).bits, first.bits)


def test_two_runs_of_the_same_call_give_the_same_pixels(pipe):
    first, second = (pipe("a", **SMALL, seed=1).images[0].tobytes() for _ in range(2))
    assert first == second


def test_saved_pipeline_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = BitDancePipeline.from_pretrained(str(tmp_path / "saved"), device="cpu", dtype="float32")
    a, b = (p("a red cube", **SMALL, seed=1) for p in (pipe, again))
    assert torch.equal(a.bits, b.bits) and a.images[0].tobytes() == b.images[0].tobytes()
    with pytest.raises(ValueError, match="not empty"):
        pipe.save_pretrained(tmp_path / "saved")


def test_the_parts_are_reachable(pipe):
    assert isinstance(pipe.model, BitDanceModel)
    assert pipe.model.tokenizer.downsampling == 8
    assert all(hasattr(pipe.model, part) for part in ("projector", "backbone", "head"))
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)


def test_bfloat16_makes_pictures_and_moves_back():
    pipe = BitDancePipeline.from_pretrained(GOLDEN / "t2i_ckpt", device="cpu", dtype=torch.bfloat16)
    out = pipe("a red cube", **SMALL, seed=1, output_type="np")
    assert pipe.dtype == torch.bfloat16 and np.isfinite(out.images).all() and out.bits.dtype == torch.float32
    assert pipe.to("cpu", "float32").dtype == torch.float32
    pipe("a red cube", **SMALL, seed=1)


def test_a_preset_of_the_model_holds_until_another_is_named(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model, "extras", {"defaults": {"preset": "balanced", "guidance_scale": 1.5}})
    bits = lambda **said: pipe("a", 32, 32, seed=1, output_type="bits", **said).bits  # noqa: E731
    balanced = {"sampler": "dpmpp_2m_sde", "num_inference_steps": 8}
    assert torch.equal(bits(), bits(preset="published", guidance_scale=1.5, **balanced))
    assert torch.equal(bits(num_inference_steps=3), bits(preset="balanced", num_inference_steps=3))
    published = bits(preset="published")
    assert torch.equal(published, bits(preset="published", sampler="euler_maruyama", num_inference_steps=50))
    assert not torch.equal(published, bits())


def test_defaults_of_the_model_are_used(pipe, monkeypatch):
    defaults = {"height": 32, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.5}
    monkeypatch.setattr(pipe.model, "extras", {"defaults": defaults, "sizes": [[32, 16]]})
    out = pipe("a", seed=1)
    assert out.images[0].size == (16, 32)
    assert torch.equal(out.bits, pipe("a", 32, 16, num_inference_steps=2, guidance_scale=1.5, seed=1).bits)
    with pytest.raises(ValueError, match="Nearest supported sizes: 32×16"):
        pipe("a", 32, 32)


def test_published_defaults(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(bitdance.pipeline, "generate_bits", lambda *args, **_: seen.append(args) or torch.ones(1, 8, 2, 2))
    pipe("a", output_type="bits")
    assert seen[0][2:5] == (128, 128, Sampling(50, 7.5, "euler_maruyama"))


def test_a_generative_decoder_draws_last_from_the_pictures_own_generator(pipe):
    torch.manual_seed(0)
    tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=8, gan_decoder=True))
    model = pipe.model
    other = BitDancePipeline(BitDanceModel(tokenizer.eval(), model.text_tokenizer, model.projector, model.backbone, model.head))
    out = other(["a", "b"], **SMALL, seed=3)
    for i, prompt in enumerate("ab"):
        generator = seeded(3 + i)
        bits = generate_bits(model, [prompt], 4, 6, Sampling(3, 4.0), [generator])
        noise = torch.randn(bits.shape, generator=generator)
        assert torch.equal(bits[0], out.bits[i])
        with torch.no_grad():
            expected = to_uint8(tokenizer.decoder(bits, noise))[0]
        assert (torch.from_numpy(np.array(out.images[i])).int() - expected.int()).abs().max() <= 1


def test_callback_comes_once_per_block_with_the_bits_so_far(pipe):
    seen = []

    def callback(who, block, t, kwargs):
        assert who is pipe
        seen.append((block, t, kwargs["bits"]))
        return kwargs

    out = pipe("a", **SMALL, seed=1, callback_on_step_end=callback)
    assert [(block, t) for block, t, _ in seen] == [(i, (i + 1) / 6) for i in range(6)]
    assert torch.equal(seen[-1][2], out.bits)
    assert [int((bits == 0).sum()) for _, _, bits in seen] == [8 * 4 * left for left in (5, 4, 3, 2, 1, 0)]


def test_an_exception_in_the_callback_comes_through(pipe):
    class Enough(Exception):
        pass

    def callback(*_):
        raise Enough

    with pytest.raises(Enough):
        pipe("a", **SMALL, seed=1, callback_on_step_end=callback)


def test_the_progress_bar_counts_blocks_and_can_be_switched_off(pipe, capsys, monkeypatch):
    pipe("a", **SMALL, seed=1)
    assert capsys.readouterr().err == "", "silent when there is no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    pipe("a", **SMALL, seed=1)
    assert "6/6" in capsys.readouterr().err
    monkeypatch.setattr(pipe, "_progress", {})
    pipe.set_progress_bar_config(disable=True)
    pipe("a", **SMALL, seed=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, "string"),
        ({"prompt": []}, "at least one"),
        ({"prompt": ["a", None]}, "prompt 2 of 2"),
        ({"prompt": "a\ud800"}, "position 1"),
        ({"height": 100}, "Nearest supported sizes: 96×"),
        ({"height": 32.0}, "height = 32.0"),
        ({"width": 0}, "width = 0"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps = True"),
        ({"guidance_scale": math.nan}, "from 0 to 1000"),
        ({"guidance_scale": math.inf}, "from 0 to 1000"),
        ({"guidance_scale": "7"}, "from 0 to 1000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, "from 0 to 9223372036854775807"),
        ({"seed": 1.0}, "seed = 1.0"),
        ({"seed": "1"}, "seed = '1'"),
        ({"seed": [1, 2]}, "2 seeds for 1"),
        ({"generator": [seeded(1), seeded(2)]}, "2 generators for 1"),
        ({"generator": 5}, "torch.Generator"),
        ({"generator": seeded(1), "seed": 1}, "both seed and generator"),
        ({"output_type": "jpg"}, "pil, np, pt, bits"),
        ({"sampler": "leapfrog"}, "euler_maruyama, euler"),
        ({"callback_on_step_end": 1}, "function"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(pipe, monkeypatch, change, message):
    def fail(*_):
        raise AssertionError("work began")

    monkeypatch.setattr(bitdance.pipeline, "generate_bits", fail)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a", **SMALL, **change})


def test_one_generator_twice_is_refused(pipe):
    generator = seeded(1)
    with pytest.raises(ValueError, match="twice"):
        pipe(["a", "b"], **SMALL, generator=[generator, generator])


@pytest.mark.parametrize("dtype", ["int8", "fp32", torch.int64, 3])
def test_unknown_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        BitDancePipeline.from_pretrained(GOLDEN / "t2i_ckpt", dtype=dtype)


def test_a_model_without_picture_tokenizer_is_refused(pipe):
    model = pipe.model
    with pytest.raises(ValueError, match="decoder"):
        BitDancePipeline(BitDanceModel(None, model.text_tokenizer, model.projector, model.backbone, model.head))


def test_a_cancelled_picture_ends_alone(pipe: BitDancePipeline) -> None:
    prompts, seeds, settings = (
        ["a red cube", "a much longer prompt of a green sphere", "a fox"],
        [1, 2, 3],
        {"num_inference_steps": 2},
    )
    whole = pipe(prompts, 64, 64, seed=seeds, output_type="bits", **settings).bits

    def stop(pipe: BitDancePipeline, block: int, t: float, values: dict[str, torch.Tensor]) -> None:
        if block == 0:
            pipe.cancel(1)

    out = pipe(prompts, 64, 64, seed=seeds, output_type="bits", callback_on_step_end=stop, **settings).bits
    assert torch.equal(out[0], whole[0]) and torch.equal(out[2], whole[2])
    assert bool((out[1] == 0).any()) and torch.equal(out[1][out[1] != 0], whole[1][out[1] != 0])
    assert torch.equal(pipe(prompts, 64, 64, seed=seeds, output_type="bits", **settings).bits, whole)  # the next run is whole
