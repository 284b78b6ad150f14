"""The bundled model is small, whole, loads without a network and draws what it is asked for."""

import json

import pytest
import torch

from bitdance import BitDancePipeline
from bitdance.folder.parts import DEMO
from lfq_tokenizer.weights import read_safetensors
from stages.data.captions import PALETTE
from stages.measure.prompts import background_of

pytestmark = pytest.mark.slow

MEGABYTES = 40


@pytest.fixture(scope="module")
def pipe():
    pipe = BitDancePipeline.from_pretrained("demo", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_package_carries_it_as_safetensors_of_at_most_forty_megabytes():
    files = [path for path in DEMO.iterdir() if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4 and sum(path.stat().st_size for path in weights) <= MEGABYTES * 10**6
    for path in weights:
        assert all(tensor.isfinite().all() for tensor in read_safetensors(path).values()), path.name


def test_it_says_what_it_knows_and_names_no_place_of_the_machine_that_made_it():
    text = (DEMO / "bitdance.json").read_text(encoding="utf-8")
    extras = json.loads(text)
    assert len(extras["prompts"]) == len(set(extras["prompts"])) == 300
    assert extras["sizes"] == [[64, 64], [96, 96]] and set(extras["card"]["backgrounds"]) == set(PALETTE)
    assert not any(place in text for place in ("/home", "/root", "/tmp", "/work", "runs/"))


def test_it_remembers_the_stages_that_made_it():
    stages = json.loads((DEMO / "bitdance.json").read_text(encoding="utf-8"))["card"]["stages"]
    assert [stage["name"] for stage in stages] == ["pretrain", "continue", "finetune"]


def test_it_can_be_distilled_to_64_tokens_per_step(pipe):
    height, width = pipe.model.extras["sizes"][0]
    s, p = pipe.model.tokenizer.downsampling, pipe.model.patch_side
    assert p == 4 and (height // s) % 8 == 0 and (width // s) % 8 == 0


@pytest.mark.parametrize("side", [64, 96])
def test_backgrounds_are_those_of_the_prompts_and_pictures_those_of_their_seeds(pipe, side):
    prompts = [f"a fox, 3D style, on {'an' if name[0] == 'o' else 'a'} {name} background" for name in PALETTE]
    size = {"height": side, "width": side}
    out = pipe(prompts, seed=3, **size)
    assert all(image.size == (side, side) for image in out.images)
    assert [background_of(image) for image in out.images] == list(PALETTE)
    alone = pipe(prompts[5], seed=8, **size)  # picture 5 of the batch had seed 3 + 5
    assert torch.equal(alone.bits[0], out.bits[5])


def test_different_things_are_different_pictures(pipe):
    things = ["a fox", "a cactus", "a guitar", "a hamburger"]
    bits = pipe([f"{thing}, 3D style, on a white background" for thing in things], seed=0).bits.flatten(1)
    again = pipe([f"{thing}, 3D style, on a white background" for thing in things], seed=100).bits.flatten(1)
    apart = (bits[:, None] != again[None]).float().mean(-1)  # row: seed 0, column: seed 100
    assert (apart.argmin(dim=1) == torch.arange(len(things))).all()
