"""The server's answers: fields, errors, the same pictures as the command's, class models, limits, keys."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serve_model import SIZE, Hold, class_folder, client, in_background, opened, same, text_folder, until
from starlette.testclient import TestClient

from bitdance.cli import main
from bitdance.picture import metadata_of
from bitdance.serve.model import ServedModel
from bitdance.serve.settings import Limits

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> ServedModel:
    return ServedModel.load(str(text_folder(tmp_path_factory.mktemp("models") / "text")), ("cpu",))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: Any) -> ServedModel:
    return ServedModel.load(str(class_folder(tmp_path_factory.mktemp("models") / "classes")), ("cpu",))


@pytest.fixture
def api(model: ServedModel) -> Iterator[TestClient]:
    with client(model) as found:
        yield found


def pictures(answer: Any) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    return [opened(one["b64_json"]) for one in answer.json()["data"]]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_a_picture_is_the_command_s_alone_and_in_company(model: ServedModel, tmp_path: Path, monkeypatch: Any) -> None:
    """Pixels and metadata: alone, and in a batch with prompts of other lengths."""
    prompt = "a red cube on a table"
    folder = str(model._folder)
    command = ["generate", prompt, "--model", folder, "--seed", "5", "--device", "cpu", "-o", str(tmp_path), "-q"]
    assert main(command) == 0
    wanted = Image.open(next(tmp_path.glob("*-5.png")))
    with client(model) as api:
        alone = pictures(api.post(PATH, json={"prompt": prompt, "seed": 5}))[0]
        assert same(alone, wanted) and metadata_of(alone) == metadata_of(wanted) and metadata_of(alone)
        hold = Hold(monkeypatch, model.pipe)
        first = in_background(lambda: api.post(PATH, json={"prompt": "x", "seed": 1}))
        hold.wait()
        texts = ["a", prompt, "a blue ball and a very long description of all that lies around it, " * 3]
        asked = [in_background(lambda t=t: api.post(PATH, json={"prompt": t, "seed": 5})) for t in texts]
        until(lambda: api.app.state.queue.waiting == 3)
        hold.go()
        found = [pictures(one.result())[0] for one in asked]
        assert first.result().status_code == 200 and hold.batches == [1, 3]
    assert same(found[1], wanted) and metadata_of(found[1]) == metadata_of(wanted)
    assert not same(found[0], wanted) and not same(found[2], wanted)


def test_several_pictures_count_their_seeds_up(api: TestClient) -> None:
    """Complaint (d): n = 2 hangs or loses answers."""
    answer = api.post(PATH, json={"prompt": "a fox", "n": 3, "seed": 7, "size": SIZE})
    body = answer.json()
    assert body["seeds"] == [7, 8, 9] and body["size"] == SIZE and body["output_format"] == "png" and body["created"] > 1e9
    found = pictures(answer)
    assert same(found[2], pictures(api.post(PATH, json={"prompt": "a fox", "seed": 9}))[0]) and not same(found[0], found[1])
    tokens = body["usage"]
    assert tokens["output_tokens"] == 3 * 16 and tokens["total_tokens"] == tokens["input_tokens"] + 48 > 48
    fresh = [api.post(PATH, json={"prompt": "a fox"}).json()["seeds"] for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_any_model_name_means_the_one_that_is_served(api: TestClient) -> None:
    """Complaint (e): a hard-wired model name."""
    one, other = (pictures(api.post(PATH, json={"prompt": "a", "seed": 1, "model": m}))[0] for m in ("dall-e-3", "text"))
    assert same(one, other)
    assert api.get("/v1/models/gpt-image-1").json()["id"] == "text"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "a", "size": "100x64"}, "size", "nearest as size, width first: 96x64"),
        ({"prompt": "a", "size": "1x1"}, "size", "16x16"),
        ({"prompt": "a", "size": "0x64"}, "size", "16x64"),
        ({"prompt": "a", "size": "large"}, "size", '"auto" or width and height'),
        ({"prompt": "a", "size": 64}, "size", "size = 64"),
        ({"prompt": "a", "size": "4096x4096"}, "size", "up to 4,194,304"),
        ({"prompt": "a", "n": 11}, "n", "from 1 to 10"),
        ({"prompt": "a", "n": "2"}, "n", "n = '2'"),
        ({"prompt": "a", "n": True}, "n", "n = True"),
        ({"prompt": "a", "seed": -1}, "seed", "seed = -1"),
        ({"prompt": "a", "seed": 1.5}, "seed", "seed = 1.5"),
        ({"prompt": "a", "steps": 0}, "steps", "from 1 to 10000"),
        ({"prompt": "a", "num_inference_steps": 0}, "steps", "from 1 to 10000"),
        ({"prompt": "a", "steps": 2, "num_inference_steps": 3}, "steps", "given twice"),
        ({"prompt": "a", "guidance": "high"}, "guidance", "a number from 0 to 1000"),
        ({"prompt": "a", "sampler": "magic"}, "sampler", "allowed are euler_maruyama"),
        ({"prompt": "a", "preset": "magic"}, "preset", "allowed are published"),
        ({"prompt": "a", "guidance_interval": [1, 0]}, "guidance_interval", "low"),
        ({"prompt": "a", "output_format": "gif"}, "output_format", "png, webp, jpeg"),
        ({"prompt": "a", "output_compression": 101}, "output_compression", "from 0 to 100"),
        ({"prompt": "a", "partial_images": 4}, "partial_images", "from 0 to 3"),
        ({"prompt": "a", "partial_images": False}, "partial_images", "partial_images = False"),
        ({"prompt": "a", "previews": 65}, "previews", "from 0 to 64"),
        ({"prompt": "a", "previews": 1, "partial_images": 1}, None, "keep one"),
        ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
        ({"prompt": "a", "job": "../x"}, "job", "8 to 64 letters"),
        ({"prompt": ["a"]}, "prompt", "a string is allowed"),
        ({"prompt": "\ud800"}, None, "lone surrogate"),
        ({}, "prompt", "prompt is missing"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        # complaint (f): quality silently wrong. What would change the picture is refused, not left out
        ({"prompt": "a", "stpes": 3}, "stpes", "did you mean 'steps'?"),
        ({"prompt": "a", "background": "transparent"}, "background", "auto, opaque are allowed"),
        ({"prompt": "a", "tau": 1.0}, "tau", "not for a model of this kind"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt", "takes none"),
        ({"prompt": "a", "class_label": 3}, None, "this model makes pictures of prompts; give a prompt, and no class_label"),
    ],
)
def test_wrong_fields_are_named(api: TestClient, fields: Any, param: str | None, words: str) -> None:
    """Complaint (c) too: a size is never ignored, and the nearest ones are named."""
    error = error_of(api.post(PATH, content=json.dumps(fields), headers={"content-type": "application/json"}), 400)
    assert words in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    assert api.app.state.queue.waiting == 0


def test_sizes_are_width_first_and_obeyed(api: TestClient) -> None:
    assert pictures(api.post(PATH, json={"prompt": "a", "size": "48x32"}))[0].size == (48, 32)
    assert pictures(api.post(PATH, json={"prompt": "a", "size": "auto"}))[0].size == (32, 32)


def test_settings_that_change_nothing_are_taken_and_those_that_do_change_the_picture(api: TestClient) -> None:
    plain = pictures(api.post(PATH, json={"prompt": "a", "seed": 1}))[0]
    more = {"quality": "hd", "background": "auto", "moderation": "low", "style": "vivid", "user": "me", "steps": None}
    assert same(plain, pictures(api.post(PATH, json={"prompt": "a", "seed": 1, **more}))[0])
    for change in ({"steps": 5}, {"guidance_scale": 9.0}, {"sampler": "euler"}, {"preset": "fast"}):
        found = pictures(api.post(PATH, json={"prompt": "a", "seed": 1, **change}))[0]
        assert not same(plain, found), change
        said = metadata_of(found) or {}
        assert said["steps"] == change.get("steps", 5 if "preset" in change else 2)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "an object is allowed"),
        (b"\xff", "not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "given twice"),
        (b'{"prompt": "a", "seed": NaN}', "seed = nan"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "seed = "),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "not valid JSON"),
    ],
)
def test_bad_json_is_one_clear_line(api: TestClient, body: bytes, words: str) -> None:
    error = error_of(api.post(PATH, content=body, headers={"content-type": "application/json"}), 400)
    assert words in error["message"] and len(error["message"]) < 300


def test_a_request_that_is_too_large_or_of_another_type_is_refused(model: ServedModel) -> None:
    with client(model, Limits(body_bytes=1000)) as api:
        large = {"prompt": "a" * 2000}
        assert error_of(api.post(PATH, json=large), 413)["code"] == "too_large"
        chunks = (b'{"prompt": "', b"a" * 2000, b'"}')  # without a length
        answer = api.post(PATH, content=iter(chunks), headers={"content-type": "application/json"})
        assert error_of(answer, 413)["code"] == "too_large"
        assert "application/json" in error_of(api.post(PATH, content=b'{"prompt": "a"}'), 400)["message"]


def test_unknown_addresses_have_the_error_form(api: TestClient) -> None:
    error_of(api.get("/v1/images"), 404)
    error_of(api.put("/v1/models"), 405)
    assert error_of(api.get("/v1/jobs/nothing"), 404)["code"] == "job_not_found"
    assert "cannot edit" in error_of(api.post("/v1/images/edits"), 400)["message"]


def test_formats_and_data_urls(api: TestClient) -> None:
    base = {"prompt": "a", "seed": 1}
    png = pictures(api.post(PATH, json=base))[0]
    for name in ("webp", "jpeg"):
        found = pictures(api.post(PATH, json={**base, "output_format": name}))[0]
        assert found.format == name.upper() and found.size == png.size
        grey, wanted = (np.asarray(image.convert("L").resize((4, 4)), dtype=float) for image in (found, png))
        assert np.abs(grey - wanted).max() < 20  # noise loses its detail, not its light
        small = api.post(PATH, json={**base, "output_format": name, "output_compression": 1}).json()["data"][0]["b64_json"]
        assert len(small) < len(api.post(PATH, json={**base, "output_format": name}).json()["data"][0]["b64_json"])
    url = api.post(PATH, json={**base, "response_format": "url"}).json()["data"][0]["url"]
    assert same(opened(url.removeprefix("data:image/png;base64,")), png)


def test_the_model_is_described(model: ServedModel, classes: ServedModel) -> None:
    with client(model) as api:
        (found,) = api.get("/v1/models").json()["data"]
    assert found["kind"] == "next_patch" and found["classes"] is None and not found["can_edit"]
    assert found["presets"] == ["published", "balanced", "fast"], "those for distilled models are not offered"
    assert found["defaults"] == {"size": SIZE, "steps": 2, "guidance": 2.0, "sampler": "euler_maruyama"}
    with client(classes) as api:
        (found,) = api.get("/v1/models").json()["data"]
        assert found["kind"] == "class_patch" and found["classes"] == 10 and found["sizes"] == ["64x64"]
        assert api.get("/v1/models/classes").json()["class_names"][:3] == ["tench", "crane", "fox"]


def test_class_models_take_classes_and_no_prompts(classes: ServedModel) -> None:
    with client(classes) as api:
        number, name, empty = (
            pictures(api.post(PATH, json={"seed": 1, **fields}))[0]
            for fields in ({"class_label": 2}, {"class_label": "Fox"}, {"class_label": 2, "prompt": ""})
        )
        assert same(number, name) and same(number, empty)
        said = metadata_of(number) or {}
        assert said["class"] == 2 and said["class_name"] == "fox" and "prompt" not in said
        words = "this model makes pictures of classes; give class_label, a number or a name, and no prompt"
        for fields in ({"prompt": "a fox"}, {}, {"prompt": "a fox", "class_label": 2}):
            assert error_of(api.post(PATH, json=fields), 400)["message"] == words
        for label, told in ((10, "from 0 to 9"), ("wolf", "unknown class 'wolf'"), ("all", "unknown class"), (True, "True")):
            assert told in error_of(api.post(PATH, json={"class_label": label}), 400)["message"]
        assert "64x64" in error_of(api.post(PATH, json={"class_label": 1, "size": "1024x1024"}), 400)["message"]


def test_the_key_is_asked_for(model: ServedModel) -> None:
    with client(model, api_key="geheim") as api:
        for path in ("/v1/models", "/metrics", "/v1/jobs/x"):
            for headers in ({}, {"authorization": "Bearer geheim2"}, {"authorization": "geheim"}, {"authorization": "Bearer ü"}):
                found = api.get(path, headers={k: v.encode("utf-8") for k, v in headers.items()})
                assert error_of(found, 401)["code"] == "invalid_api_key" and found.headers["www-authenticate"] == "Bearer"
        assert api.get("/v1/models", headers={"authorization": "Bearer geheim"}).status_code == 200
        assert api.get("/health").status_code == 200
        error_of(api.post(PATH, json={"prompt": "a"}), 401)


def test_pages_of_other_origins_may_not_call_unless_they_are_named(model: ServedModel) -> None:
    other = {"origin": "https://pages.example"}
    ask = {**other, "access-control-request-method": "POST"}
    with client(model) as api:
        assert error_of(api.get("/v1/models", headers=other), 403)["code"] == "origin"
        assert api.get("/v1/models", headers={"origin": "http://testserver"}).status_code == 200
        assert "access-control-allow-origin" not in api.options(PATH, headers=ask).headers
    with client(model, cors=["https://pages.example"]) as api:
        assert api.get("/v1/models", headers=other).headers["access-control-allow-origin"] == "https://pages.example"
        assert api.options(PATH, headers=ask).status_code == 200
        error_of(api.get("/v1/models", headers={"origin": "https://others.example"}), 403)


def test_operators_see_health_metrics_and_documentation(api: TestClient) -> None:
    pictures(api.post(PATH, json={"prompt": "a", "n": 2}))
    error_of(api.post(PATH, json={"prompt": 3}), 400)
    until(lambda: api.get("/health").json()["running"] == 0)  # a batch is counted after its last answer
    text = api.get("/metrics").text
    assert f'bitdance_requests_total{{route="{PATH}",status="200"}} 1.0' in text
    assert f'bitdance_requests_total{{route="{PATH}",status="400"}} 1.0' in text
    assert 'bitdance_pictures_total{outcome="done"} 2.0' in text and "bitdance_batch_pictures_sum 2.0" in text
    assert api.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}
    fields = api.get("/openapi.json").json()["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "seed" in fields["properties"] and "class_label" not in fields["properties"]
    assert api.get("/docs").status_code == 200


def test_a_page_is_shown_where_there_is_one(model: ServedModel, tmp_path: Path) -> None:
    with client(model, page=tmp_path) as api:
        assert api.get("/", follow_redirects=False).headers["location"] == "/docs"
    (tmp_path / "index.html").write_text("<title>hello</title>")
    with client(model, page=tmp_path, api_key="k") as api:
        assert "hello" in api.get("/").text
        assert api.get("/health").status_code == 200 and api.get("/v1/models").status_code == 401


def test_a_broken_picture_costs_itself_alone_and_tells_no_secrets(model: ServedModel, monkeypatch: Any) -> None:
    """A batch that fails is halved until the broken one stands alone."""
    hold = Hold(monkeypatch, model.pipe)
    generate = model.pipe.generate

    def breaks(conditions: Any, *rest: Any) -> Any:
        if "broken" in conditions:
            raise RuntimeError(f"secret of {__file__}")
        return generate(conditions, *rest)

    monkeypatch.setattr(model.pipe, "generate", breaks)
    with client(model) as api:
        first = in_background(lambda: api.post(PATH, json={"prompt": "x"}))
        hold.wait()
        texts = ("a", "b", "broken", "c")
        asked = [in_background(lambda t=t: api.post(PATH, json={"prompt": t, "seed": 1})) for t in texts]
        until(lambda: api.app.state.queue.waiting == 4)
        hold.go()
        answers = [one.result() for one in asked]
        assert [answer.status_code for answer in answers] == [200, 200, 500, 200] and first.result().status_code == 200
        assert "secret" not in answers[2].text and ".py" not in answers[2].text
        assert answers[2].headers["x-should-retry"] == "false"
        pictures(api.post(PATH, json={"prompt": "a"}))  # the worker lives


def test_an_unforeseen_error_tells_no_secrets(model: ServedModel, monkeypatch: Any) -> None:
    with client(model) as api:
        monkeypatch.setattr(model, "plan", lambda *_: 1 / 0)
        answer = api.post(PATH, json={"prompt": "a"})
    assert error_of(answer, 500)["code"] == "internal" and "division" not in answer.text and "Traceback" not in answer.text
