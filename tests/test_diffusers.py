"""A folder of `bitdance export --format diffusers`, opened by real diffusers: the same bits, and the manners of its pipelines."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'bitdance[diffusers]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'bitdance[diffusers]'")

from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from golden_cases import GOLDEN

from bitdance import BitDancePipeline
from bitdance.folder.conversion import convert
from bitdance.folder.parts import DEMO
from bitdance.folder.source import StoredModel
from bitdance_diffusers import BitDanceDiffusionPipeline

pytestmark = pytest.mark.slow

MODELS = {"published": (GOLDEN / "t2i_ckpt", 32), "demo": (DEMO, 64)}
PROMPTS = ["a red cube", "a blue ball on a table"]
MODULES = ("text_encoder", "autoencoder", "diffusion_head", "projector")


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def settings(size: int) -> dict[str, Any]:
    return {"height": size, "width": size, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("diffusers")
    for name, (model, _) in MODELS.items():
        convert(StoredModel.open(model), place / name, "diffusers", shard_bytes=100_000)
    return {name: place / name for name in MODELS}


@pytest.fixture
def pipe(folders: dict[str, Path]) -> BitDanceDiffusionPipeline:
    made = BitDanceDiffusionPipeline.from_pretrained(str(folders["published"]), dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def wanted() -> Any:
    ours = BitDancePipeline.from_pretrained(MODELS["published"][0], device="cpu")
    return ours(PROMPTS, generator=generators(), **settings(32))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("remote", [True, False], ids=["pipeline.py", "our class"])
def test_a_batch_of_prompts_gives_the_bits_and_pictures_of_ours(folders: dict[str, Path], name: str, remote: bool) -> None:
    model, size = MODELS[name]
    expected = BitDancePipeline.from_pretrained(model, device="cpu")(PROMPTS, generator=generators(), **settings(size))
    if remote:
        pipe = DiffusionPipeline.from_pretrained(str(folders[name]), trust_remote_code=True, dtype=torch.float32)
    else:
        pipe = BitDanceDiffusionPipeline.from_pretrained(str(folders[name]), dtype=torch.float32)
    assert type(pipe) is BitDanceDiffusionPipeline
    found = pipe(PROMPTS, generator=generators(), **settings(size))
    assert torch.equal(found.bits, expected.bits) and torch.equal(found.images, expected.images)
    alone = pipe(PROMPTS[1], generator=generators()[1], **settings(size))
    assert torch.equal(alone.bits[0], expected.bits[1])  # a picture does not depend on its neighbours
    assert pipe.config.settings == {
        k: v for k, v in StoredModel.open(model).bitdance_json().items() if k in ("defaults", "sizes")
    }


def test_a_fresh_process_needs_one_call_and_a_missing_package_is_said(folders: dict[str, Path]) -> None:
    opening = f"DiffusionPipeline.from_pretrained({str(folders['published'])!r}, trust_remote_code=True)"
    hide = "sys.modules['bitdance_diffusers'] = None; "
    for hidden, expected in (("", "BitDanceDiffusionPipeline"), (hide, "pip install 'bitdance[diffusers]'")):
        code = f"import sys; {hidden}from diffusers import DiffusionPipeline; print(type({opening}).__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode == 0) == (not hidden) and expected in done.stdout + done.stderr


def test_names_are_those_of_the_community_port(folders: dict[str, Path]) -> None:
    folder = folders["published"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"][-1] == "BitDanceDiffusionPipeline"
    for part, name in (("autoencoder", "Autoencoder"), ("diffusion_head", "DiffusionHead"), ("projector", "Projector")):
        assert index[part] == [f"bitdance_diffusers.modeling_{part}", f"BitDance{name}"]
        assert (folder / part / "diffusion_pytorch_model.safetensors").is_file()
        assert json.loads((folder / part / "config.json").read_text())["_class_name"] == f"BitDance{name}"
    assert index["text_encoder"] == ["transformers", "Qwen3ForCausalLM"]
    assert index["tokenizer"] == ["transformers", "Qwen2TokenizerFast"]
    assert json.loads((folder / "projector" / "config.json").read_text())["in_dim"] == 8


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offload_is_honoured_and_changes_no_bit(pipe: BitDanceDiffusionPipeline, wanted: Any, way: str) -> None:
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:  # what enable_sequential_cpu_offload does; accelerate itself fails there on the device "cpu:0"
        for name in MODULES:
            module = getattr(pipe, name)
            cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)
        assert all(p.is_meta for name in MODULES for p in getattr(pipe, name).parameters())
    calls: list[str] = []
    for name in MODULES:
        hook, before = getattr(pipe, name)._hf_hook, getattr(pipe, name)._hf_hook.pre_forward
        hook.pre_forward = lambda *args, _name=name, _before=before, **kw: (calls.append(_name), _before(*args, **kw))[1]
    found = pipe(PROMPTS, generator=generators(), **settings(32))
    assert torch.equal(found.bits, wanted.bits) and torch.equal(found.images, wanted.images)
    blocks = 4  # of 2 × 2 tokens, in a picture of 4 × 4
    assert {name: calls.count(name) for name in MODULES} == {
        "text_encoder": blocks,
        "diffusion_head": blocks,
        "projector": blocks - 1,
        "autoencoder": 2,
    }


def test_the_autoencoder_sends_the_text_encoder_away(pipe: BitDanceDiffusionPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.autoencoder._hf_hook.prev_module_hook.model is pipe.text_encoder
    assert [pipe.diffusion_head._hf_hook.prev_module_hook, pipe.projector._hf_hook.prev_module_hook] == [None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_from_a_device_changes_no_bit(folders: dict[str, Path], way: str) -> None:
    made = [BitDanceDiffusionPipeline.from_pretrained(str(folders["published"]), dtype=torch.float32) for _ in range(2)]
    getattr(made[0], way)()
    made[1].to("cuda")
    first, second = (pipe(PROMPTS, generator=generators(), **settings(32)) for pipe in made)
    assert torch.equal(first.bits, second.bits)
    assert all(p.device.type in ("cpu", "meta") for name in MODULES for p in getattr(made[0], name).parameters())


def test_progress_bar_callback_and_outputs(pipe: BitDanceDiffusionPipeline, wanted: Any, capsys: Any) -> None:
    pipe.set_progress_bar_config(desc="my bar", disable=False)
    seen: list[tuple[Any, int, float, list[str]]] = []

    def look(host: Any, block: int, t: float, values: dict[str, Any]) -> None:
        seen.append((host, block, t, list(values)))

    arguments = {**settings(32), "generator": generators(), "callback_on_step_end": look}
    (images,) = pipe(PROMPTS, return_dict=False, **arguments)
    assert torch.equal(images, wanted.images)
    assert "my bar" in (shown := capsys.readouterr().err) and "4/4" in shown
    assert [entry[1:] for entry in seen] == [(m, (m + 1) / 4, ["bits"]) for m in range(4)]
    assert all(entry[0] is pipe for entry in seen)
    pipe.set_progress_bar_config(disable=True)
    for kind in ("bits", "latent"):
        latent = pipe(PROMPTS, **{**settings(32), "generator": generators(), "output_type": kind})
        assert torch.equal(latent.images, wanted.bits)
    assert "my bar" not in capsys.readouterr().err
    array = pipe(PROMPTS, **{**settings(32), "generator": generators(), "output_type": "np"}).images
    assert array.shape == (2, 32, 32, 3) and np.array_equal(array, wanted.images.permute(0, 2, 3, 1).numpy())
    four = pipe(PROMPTS, num_images_per_prompt=2, **{**settings(32), "generator": generators(4), "output_type": "pil"}).images
    assert [picture.size for picture in four] == [(32, 32)] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "jpg"}, "output_type = 'jpg'"),
        ({"height": 33}, "Nearest supported sizes"),
        ({"generator": generators(3)}, "3 generators for 2 pictures"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "there is bits"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
    ],
)
def test_bad_arguments_are_named(pipe: BitDanceDiffusionPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS, **{**settings(32), **arguments})


def test_what_diffusers_saves_again_is_read_by_all(pipe: BitDanceDiffusionPipeline, wanted: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    for other in (
        BitDanceDiffusionPipeline.from_pretrained(str(tmp_path / "again")),
        BitDancePipeline.from_pretrained(tmp_path / "again", device="cpu"),
    ):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(other(PROMPTS, generator=generators(), **settings(32)).bits, wanted.bits)


def test_the_positions_stay_exact_in_bfloat16(pipe: BitDanceDiffusionPipeline) -> None:
    before = pipe.text_encoder.model.rotary_emb.inv_freq.clone()
    pipe.to(torch.bfloat16)
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert torch.equal(pipe.text_encoder.model.rotary_emb.inv_freq, before)
