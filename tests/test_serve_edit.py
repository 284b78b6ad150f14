"""The server over refinement and next-scale models: edits, negative prompts, previews of scales."""

import base64
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from refine_model import class_model, saved, text_model
from scale_cases import var_state
from serve_model import client, opened, running, same
from small_files import picture_bytes

from bitdance.cli import main
from bitdance.picture import metadata_of
from bitdance.serve.model import ServedModel
from bitdance.serve.settings import Limits

PATH, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: Any) -> ServedModel:
    return ServedModel.load(str(saved(class_model(), tmp_path_factory.mktemp("refine") / "classes")), ("cpu",))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: Any) -> ServedModel:
    return ServedModel.load(str(saved(text_model(), tmp_path_factory.mktemp("refine") / "texts")), ("cpu",))


def masks(size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """OpenAI's mask, transparent at the left, and ours, white there."""
    ours = Image.new("L", size, 0)
    ours.paste(255, (0, 0, size[0] // 2, size[1]))
    theirs = Image.new("RGBA", size, (9, 9, 9, 255))
    theirs.putalpha(ours.point(lambda level: 255 - level))
    return theirs, ours


def test_an_edit_is_the_command_s(classes: ServedModel, tmp_path: Path) -> None:
    """Through OpenAI's client: transparent is what the command's mask has white; pixels and metadata."""
    before = classes.pipe(class_label="ant", seed=1).images[0]
    theirs, ours = masks(before.size)
    before.save(tmp_path / "image.png")
    ours.save(tmp_path / "mask.png")
    places = ["edit", str(tmp_path / "image.png"), "--class", "bee", "--mask", str(tmp_path / "mask.png")]
    assert main([*places, "--model", str(classes._folder), "--seed", "3", "--device", "cpu", "-o", str(tmp_path / "o.png")]) == 0
    wanted = Image.open(tmp_path / "o.png")
    with running(classes, Limits(preview_share=1e9)) as server:
        images = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60).images
        more: Any = {"image": ("image.png", picture_bytes(before)), "mask": ("mask.png", picture_bytes(theirs)), "prompt": ""}
        own = {"seed": 3, "class_label": "bee"}
        found = images.edit(**more, extra_body=own)
        assert found.data is not None and same(opened(found.data[0].b64_json), wanted)
        said, told = metadata_of(opened(found.data[0].b64_json)) or {}, metadata_of(wanted) or {}
        assert {**said, "edit": 0} == {**told, "edit": 0} and told["seed"] == 3
        events = list(images.edit(**more, extra_body=own, stream=True, partial_images=1, n=2))
        assert [event.type.partition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"] * 2
        assert events[0].type == "image_edit.partial_image" and same(opened(events[2].b64_json), wanted)


@pytest.mark.parametrize(
    ("files", "fields", "words"),
    [
        ({}, {"class_label": "bee"}, "image is missing"),
        ({"image": b"no picture"}, {"class_label": "bee"}, "image is not a readable picture"),
        ({"image": picture_bytes(Image.new("RGB", (40, 40)))}, {"class_label": "bee"}, "nearest as size, width first: "),
        ({"image": None, "mask": picture_bytes(Image.new("RGBA", (8, 8)))}, {"class_label": "bee"}, "make them equal"),
        ({"image": None, "mask": None}, {"class_label": "bee"}, "mask has no transparency"),
        ({"image": None, "other": b""}, {"class_label": "bee"}, "unknown file 'other'"),
        ({"image": None}, {"prompt": "a bee"}, "no prompt"),
        ({"image": None}, {"class_label": "bee", "size": "16x16"}, "leave it out"),
        ({"image": None}, {"class_label": "bee", "strength": "2"}, "strength = 2"),
        ({"image": None}, {"class_label": "bee", "n": "two"}, "n = 'two'"),
        ({"image": None}, {"class_label": "bee", "guidance": "1_0"}, "guidance = '1_0'; a number from 0 to 1000"),
        ({"image": None}, {"class_label": "bee", "tau": "٣"}, "tau = '٣'; a number above 0"),
        ({"image": None}, {"class_label": "bee", "sampler": "euler"}, "not for a model of this kind"),
        ({"image": picture_bytes(Image.new("RGB", (3000, 3000)))}, {"class_label": "bee"}, "3000×3000 pixels; up to 4,194,304"),
    ],
)
def test_wrong_edits_are_named(classes: ServedModel, files: dict[str, Any], fields: dict[str, str], words: str) -> None:
    height, width = classes.rules.default_size
    whole = picture_bytes(Image.new("RGB", (width, height)))
    with client(classes) as api:
        sent = {name: ("f.png", whole if content is None else content) for name, content in files.items()}
        answer = api.post(EDITS, data=fields, files=sent or {"nothing": ("f", b"")})
        if not files:
            answer = api.post(EDITS, data=fields, files={"mask": ("f.png", whole)})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_what_is_given_twice_is_refused(classes: ServedModel) -> None:
    with client(classes) as api:
        twice = api.post(EDITS, data={"class_label": ["bee", "ant"]}, files={"image": ("f.png", b"")})
        assert twice.status_code == 400 and "'class_label' is given twice" in twice.json()["error"]["message"]
        answer = api.post(EDITS, data={"class_label": "bee"}, files=[("image[]", b"a"), ("image[]", b"b")])
    assert answer.status_code == 400 and "one picture is changed at a time" in answer.json()["error"]["message"]


def test_a_negative_prompt_changes_the_picture_and_its_mark(texts: ServedModel) -> None:
    with client(texts) as api:

        def made(**more: Any) -> Image.Image:
            return opened(api.post(PATH, json={"prompt": "an apple", "seed": 1, **more}).json()["data"][0]["b64_json"])

        plain, against = made(), made(negative_prompt="a pear")
        assert same(plain, texts.pipe("an apple", seed=1).images[0])
        assert same(against, texts.pipe("an apple", seed=1, negative_prompt="a pear").images[0]) and not same(plain, against)
        marks = [(metadata_of(image) or {})["job_hash"] for image in (plain, against)]
        assert marks[0] != marks[1] and (metadata_of(against) or {})["negative_prompt"] == "a pear"
        assert same(made(tau=0.5), texts.pipe("an apple", seed=1, tau=0.5).images[0])
        assert api.get("/v1/models").json()["data"][0]["takes_negative_prompt"] is True


def test_a_picture_that_says_its_prompt_is_changed_where_the_prompts_differ(texts: ServedModel) -> None:
    with client(texts) as api:
        before = base64.b64decode(api.post(PATH, json={"prompt": "an apple", "seed": 1}).json()["data"][0]["b64_json"])
        asked = {"prompt": "a pear", "seed": "2"}
        found = opened(api.post(EDITS, data=asked, files={"image": ("f.png", before)}).json()["data"][0]["b64_json"])
    image = opened(base64.b64encode(before).decode())
    assert same(found, texts.pipe.edit(image, "a pear", source_prompt="an apple", seed=2).images[0])
    assert not same(found, texts.pipe.edit(image, "a pear", seed=2).images[0])


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_every_setting_that_is_told_is_taken(kind: str, request: pytest.FixtureRequest) -> None:
    """What the page sends of a picture that does not say them: a setting that the server names is one that it takes."""
    with client(request.getfixturevalue(kind)) as api:
        (told,) = api.get("/v1/models").json()["data"]
        asked = {"class_label": 1} if told["classes"] else {"prompt": "a pear"}
        settings = {name: value for name, value in told["settings"].items() if value is not None} | {"adaptive": False}
        answer = api.post(PATH, json={**asked, "steps": 2, **settings})
        assert answer.status_code == 200, answer.text
        assert set(told["defaults"]) <= {"size", "steps", "guidance", *told["settings"]}


def test_scales_are_shown_as_they_grow(tmp_path: Path) -> None:
    import torch

    torch.save(var_state("vae"), tmp_path / "vae.pth")
    torch.save(var_state("var"), tmp_path / "var.pth")
    command = ["convert", str(tmp_path / "var.pth"), str(tmp_path / "model"), "--family", "var"]
    assert main([*command, "--part", f"tokenizer={tmp_path / 'vae.pth'}"]) == 0
    model = ServedModel.load(str(tmp_path / "model"), ("cpu",))
    assert "steps" not in model.describe()["defaults"] and set(model.describe()["settings"]) == set(model.words)
    with running(model, Limits(preview_share=1e9)) as server:
        images = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60).images
        own = {"class_label": 1, "seed": 4}
        events = list(images.generate(prompt="", stream=True, partial_images=3, extra_body=own))
        shown = [opened(event.b64_json) for event in events]
        assert len(shown) == 4 and {image.size for image in shown} == {shown[-1].size}
        assert same(shown[-1], model.pipe(class_label=1, seed=4).images[0])
        with pytest.raises(openai.BadRequestError, match="scales follow from the size"):
            images.generate(prompt="", extra_body={**own, "steps": 3})
        scales = len(model.pipe.sides(*model.rules.default_size))
        wrong = {**own, "guidance_by_scale": [1.5] * (scales + 1)}
        with pytest.raises(openai.BadRequestError, match=f"guidance_by_scale has {scales + 1} values; this picture has {scales}"):
            images.generate(prompt="", extra_body=wrong)
        with pytest.raises(openai.BadRequestError, match=f"guidance_by_scale has {scales + 1} values; this picture has {scales}"):
            images.edit(image=("a.png", picture_bytes(shown[-1])), prompt="", extra_body=wrong)
        right = {**own, "guidance_by_scale": [1.5] * scales, "more_smooth": True}  # a form has texts alone
        files: Any = {"image": ("a.png", picture_bytes(shown[-1])), "mask": ("m.png", picture_bytes(masks(shown[-1].size)[0]))}
        found = images.edit(**files, prompt="", extra_body=right)
        assert found.data is not None
        told = metadata_of(opened(found.data[0].b64_json)) or {}
        assert told["guidance_by_scale"] == [1.5] * scales and told["more_smooth"] is True
