"""The nodes of ComfyUI, through a stand-in of it (tests/comfy_stub.py): the library's pictures, its messages, progress, stops."""

from pathlib import Path
from typing import Any

import comfy_stub
import pytest
import torch
from comfy_models import MODELS, QUICK, loaded, small_models, started
from PIL import Image

from bitdance import load_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.mktemp("comfy") / "models")


@pytest.fixture
def host(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return started(models_dir, monkeypatch)


def by_the_library(pipe: Any, prompt: str, settings: dict[str, Any], **more: Any) -> Any:
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    said = {names.get(name, name): value for name, value in settings.items()}
    what = {"prompt": [prompt, prompt]} if pipe.names is None else {"class_label": [prompt, prompt]}
    return pipe(**what, **said, seed=7, output_type="pt", **more)


@pytest.mark.parametrize("name", MODELS)
def test_pictures_are_those_of_the_library_for_the_same_seed(host: comfy_stub.Host, name: str) -> None:
    prompt, settings = MODELS[name]
    model = loaded(host, name)
    bits = host.run("BitDanceGenerate", model=model, prompt=prompt, seed=7, n=2, **settings)
    picture = host.run("BitDanceDecode", model=model, bits=bits)
    expected = by_the_library(load_pipeline(host.models_dir / "bitdance" / name, "cpu"), prompt, settings)
    assert picture.shape[0] == 2 and picture.shape[3] == 3 and picture.dtype == torch.float32 and picture.is_contiguous()
    assert torch.equal(picture, expected.images.permute(0, 2, 3, 1))
    assert torch.equal(picture, host.run("BitDanceDecode", model=model, bits=bits))  # also a generative decoder's


def test_a_negative_prompt_is_the_library_s(host: comfy_stub.Host) -> None:
    model, (prompt, settings) = loaded(host, "refine_text"), MODELS["refine_text"]
    bits = host.run("BitDanceGenerate", model=model, prompt=prompt, negative="a ball", seed=7, n=2, **settings)
    expected = by_the_library(model, prompt, settings, negative_prompt="a ball").tokens
    assert torch.equal(bits.tokens, expected) and not torch.equal(expected, by_the_library(model, prompt, settings).tokens)


def test_the_demo_model_is_there_without_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = started(tmp_path / "nothing here", monkeypatch)
    options = host.nodes["BitDanceLoadModel"].define_schema().inputs[0].options["options"]
    assert options == ["demo"]
    model = host.run("BitDanceLoadModel", model="demo")
    bits = host.run("BitDanceGenerate", model=model, prompt="a red apple", steps=1, guidance=1.0, previews=2)
    assert host.run("BitDanceDecode", model=model, bits=bits).shape[0] == 1
    assert host.room > 1e7  # other models were asked to make room
    assert not next(model.model.head.parameters()).is_inference()


@pytest.mark.parametrize("name", MODELS)
def test_progress_and_previews_arrive_after_every_block(host: comfy_stub.Host, name: str) -> None:
    prompt, settings = MODELS[name]
    model, blocks = loaded(host, name), []
    by_the_library(model, prompt, settings, callback_on_step_end=lambda pipe, block, share, values: blocks.append(share))
    host.run("BitDanceGenerate", model=model, prompt=prompt, previews=64, **settings)
    assert [done / total for done, total, _ in host.updates] == pytest.approx(blocks)
    for _, _, (form, picture, side) in host.updates:
        assert form == "JPEG" and isinstance(picture, Image.Image) and side == 512
    assert host.updates[-1][0] == host.updates[-1][1] == len(blocks) > 2


@pytest.mark.parametrize("previews", [0, 1, 2, 3])
def test_previews_are_as_many_as_was_said(host: comfy_stub.Host, previews: int) -> None:
    model = loaded(host, "classes")
    before = host.run("BitDanceGenerate", model=model, prompt="2", seed=3, previews=0, **QUICK)
    host.updates.clear()
    bits = host.run("BitDanceGenerate", model=model, prompt="2", seed=3, previews=previews, **QUICK)
    assert len(host.updates) == 4 and sum(update[2] is not None for update in host.updates) == previews
    assert torch.equal(bits.tokens, before.tokens)  # nor do they change the picture


def test_previews_are_bounded_in_a_run_whose_length_changes(host: comfy_stub.Host) -> None:
    from comfyui_bitdance.pictures import Watch

    watch, model = Watch(5), loaded(host, "classes")
    for step in range(300):
        total = 300 if step < 100 else 1000
        watch(model, step, (step + 1) / total, {"tokens": torch.zeros(1, 8, 2, 2)})
    assert sum(update[2] is not None for update in host.updates) <= 5


@pytest.mark.parametrize("name", MODELS)
def test_a_stop_ends_the_work_at_the_next_block(host: comfy_stub.Host, name: str) -> None:
    prompt, settings = MODELS[name]
    host.stop_after = 1
    with pytest.raises(comfy_stub.Interrupted):
        host.run("BitDanceGenerate", model=loaded(host, name), prompt=prompt, **settings)
    assert len(host.updates) == 1
    host.stop_after, host.updates = 10**9, []
    host.run("BitDanceGenerate", model=loaded(host, name), prompt=prompt, **settings)  # and the model is as it was
    assert host.updates[-1][0] == host.updates[-1][1]


@pytest.mark.parametrize("name", ["text", "classes", "refine", "scales"])
def test_what_is_encoded_is_what_the_library_encodes(host: comfy_stub.Host, name: str) -> None:
    model, (prompt, settings) = loaded(host, name), MODELS[name]
    images = by_the_library(model, prompt, settings).images
    picture = images.permute(0, 2, 3, 1)
    alpha = torch.cat([picture, torch.zeros_like(picture[..., :1])], dim=-1)
    expected = model.encode(images)
    for given in (picture, alpha):
        found = host.run("BitDanceEncode", model=model, image=given).tokens
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)
    again = host.run("BitDanceDecode", model=model, bits=host.run("BitDanceEncode", model=model, image=picture))
    assert again.shape == picture.shape


def square(side: int, size: int) -> torch.Tensor:
    """A MASK of the upper left corner."""
    mask = torch.zeros(1, size, size)
    mask[:, :side, :side] = 1
    return mask


def test_an_edit_keeps_the_bits_outside_of_its_mask(host: comfy_stub.Host) -> None:
    model = loaded(host, "refine")
    before = host.run("BitDanceGenerate", model=model, prompt="ant", steps=5)
    size = before.tokens.shape[-1] * model.model.tokenizer.downsampling
    asked = {"model": model, "bits": before, "prompt": "cow", "steps": 5, "mask": square(size // 2, size)}
    after = host.run("BitDanceEdit", n=2, seed=3, **asked)
    assert torch.equal(after.tokens[:, :, 2:], before.tokens[:, :, 2:].expand(2, -1, -1, -1))
    assert not torch.equal(after.tokens[0], before.tokens[0]) and not torch.equal(after.tokens[0], after.tokens[1])
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size // 2))
    expected = model.edit(before.tokens, class_label="cow", mask=mask, num_images=2, seed=3, num_inference_steps=5)
    assert torch.equal(after.tokens, expected.tokens)
    softer = host.run("BitDanceEdit", **asked, source="ant", strength=0.5)
    assert host.updates and torch.equal(softer.tokens[:, :, 2:], before.tokens[:, :, 2:])


def test_an_edit_of_scales_draws_anew_what_is_masked(host: comfy_stub.Host) -> None:
    model = loaded(host, "scales")
    before = host.run("BitDanceGenerate", model=model, prompt="1")
    size = before.tokens[-1].shape[-1] * model.model.tokenizer.downsampling
    after = host.run(
        "BitDanceEdit", model=model, bits=before, prompt="2", mask=square(2 * model.model.tokenizer.downsampling, size)
    )
    assert torch.equal(after.tokens[-1][:, 3:], before.tokens[-1][:, 3:])
    with pytest.raises(ValueError, match="needs a mask"):
        host.run("BitDanceEdit", model=model, bits=before, prompt="2")
    with pytest.raises(ValueError, match="strength is not for this kind of model; leave it out"):
        host.run("BitDanceEdit", model=model, bits=before, prompt="2", strength=0.5)


@pytest.mark.parametrize("name", ["text", "classes"])
def test_a_kind_that_cannot_edit_says_so(host: comfy_stub.Host, name: str) -> None:
    model, (prompt, settings) = loaded(host, name), MODELS[name]
    bits = host.run("BitDanceGenerate", model=model, prompt=prompt, **settings)
    with pytest.raises(ValueError, match="this kind of model cannot edit; refinement and next-scale models can"):
        host.run("BitDanceEdit", model=model, bits=bits, prompt=prompt)


def test_an_edit_is_of_one_picture_and_one_mask(host: comfy_stub.Host) -> None:
    model = loaded(host, "refine")
    two = host.run("BitDanceGenerate", model=model, prompt="ant", steps=5, n=2)
    with pytest.raises(ValueError, match="the bits are of 2 pictures; one is changed at a time"):
        host.run("BitDanceEdit", model=model, bits=two, prompt="cow")
    one = host.run("BitDanceGenerate", model=model, prompt="ant", steps=5)
    for mask, words in (
        (torch.zeros(2, 4, 4), "the batch holds 2 masks; give one"),
        (torch.zeros(1, 64, 64), "the mask is"),
        (torch.zeros(1, 4, 4), "the mask is black everywhere"),
    ):
        with pytest.raises(ValueError, match=words):
            host.run("BitDanceEdit", model=model, bits=one, prompt="cow", mask=mask)


def test_bits_of_another_model_are_refused(host: comfy_stub.Host) -> None:
    scales = host.run("BitDanceGenerate", model=loaded(host, "scales"), prompt="1")
    with pytest.raises(ValueError, match="tokens are list; give bits of shape"):
        host.run("BitDanceDecode", model=loaded(host, "refine"), bits=scales)
    demo = host.run("BitDanceEncode", model=host.run("BitDanceLoadModel", model="demo"), image=torch.rand(1, 64, 64, 3))
    with pytest.raises(ValueError, match=r"bits have shape \(1, 64, 8, 8\); expected \(batch, 8, h, w\)"):
        host.run("BitDanceDecode", model=loaded(host, "refine"), bits=demo)
