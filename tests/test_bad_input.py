"""Bad input of `bitdance generate`: exit code 2 and one line about it, before a weight is loaded or a file written."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitdance.cli import main
from bitdance.picture import read_metadata, write_png

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "t2i_ckpt"
SMALL = ["--height", "64", "--width", "64", "--steps", "2", "--device", "cpu"]
WEIGHTS = ["model.safetensors", "vision_head.safetensors", "projector.safetensors", "ae.safetensors"]
CONFIGS = ["config.json", "vision_head_config.json", "ae_config.json"]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """`refused(arguments)` runs generate, checks that it did nothing, and returns its one line of error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    def run(*arguments: str, model: Path = GOLDEN) -> str:
        output = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr("bitdance.kinds.next_patch.load_model", refuse)
            code = main(["generate", "--model", str(model), *SMALL, "-o", str(output), *arguments])
        shown = capfd.readouterr()
        assert (code, shown.out) == (2, "")
        assert not output.exists()
        assert shown.err.startswith("bitdance: error: ") and shown.err.count("\n") == 1, shown.err
        return shown.err.removeprefix("bitdance: error: ")

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny recorded model, to be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["no prompt", "--prompts FILE"]),
        (["a\ud800b"], ["prompt 1", "surrogate U+D800 at position 1"]),
        (["fine", "ab\udcff"], ["prompt 2", "surrogate U+DCFF at position 2"]),
        (["a", "--steps", "-3"], ["steps = -3", "from 1 to 10000"]),
        (["a", "--steps", "0"], ["steps = 0"]),
        (["a", "--steps", "2.5"], ["steps = '2.5'", "whole number"]),
        (["a", "--steps", "many"], ["steps = 'many'"]),
        (["a", "--guidance", "nan"], ["guidance = 'nan'", "from 0 to 1000"]),
        (["a", "--guidance", "-1"], ["guidance = -1", "from 0 to 1000"]),
        (["a", "--seed", "-1"], ["seed = -1", "from 0 to"]),
        (["a", "--seed", str(2**63)], [f"seed = {2**63}"]),
        (["--seed", "1", "a prompt"], ["seed = 'a prompt'", "prompts go before"]),
        (["a", "--seed", "1", "1"], ["seed 1 is asked for twice"]),
        (["a", "--images-per-prompt", "0"], ["n = 0"]),
        (["a", "--batch-size", "0"], ["batch_size = 0"]),
        (["a", "--width", "65"], ["height 64 × width 65", "multiples of 16", "64×64"]),
        (["a", "--height", "0"], ["height = 0"]),
        (["a", "--width", "8192"], ["width 8192", "4096"]),
        (["a", "--shard", "2/2"], ["shard '2/2'", "0/8"]),
        (["a", "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["a", "--device", "gpu9"], ["device 'gpu9'", "cpu"]),
        (["a", "--device", "meta"], ["device 'meta'", "cpu"]),
        (["a", "--frobnicate"], ["--frobnicate", "generate --help"]),
        (["a", "--prompts", "x.txt"], ["prompts come from one place"]),
        (["--prompts", "no-such-file.txt"], ["no-such-file.txt", "No such file"]),
        (["--from", "no-such-file.png"], ["no-such-file.png", "does not exist"]),
    ],
)
def test_a_bad_command_line_is_one_line_of_advice(refused: Any, arguments: list[str], expected: list[str]) -> None:
    message = refused(*arguments)
    assert all(part in message for part in expected), message


def test_an_empty_prompt_is_the_unconditional_picture(tmp_path: Path) -> None:
    command = ["generate", "", "   ", "a cat", "--model", str(GOLDEN), *SMALL, "--guidance", "1", "-o", str(tmp_path)]
    assert main(command) == 0
    empty, blank, cat = (path.read_bytes() for path in sorted(tmp_path.glob("0*.png")))
    assert empty == blank != cat
    assert read_metadata(tmp_path / "0000-empty-0.png")["prompt"] == ""


def test_a_very_long_prompt_is_cut_with_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "x " * 50_000, "--model", str(GOLDEN), *SMALL, "--guidance", "1", "-o", str(tmp_path)]
    assert main(command) == 0
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("bitdance: warning: ") and "cut to" in errors[0], errors
    assert len(list(tmp_path.glob("0000-x-*.png"))) == 1
    assert len(read_metadata(next(tmp_path.glob("0*.png")))["prompt"]) == 100_000


def test_unusual_text_is_text(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    texts = [
        "nul \0 inside",
        "שלום <|im_end|> عالم",
        "<|vision_start|>",
        "\u202e🐈\u200d⬛",
        "../../x",
        "%s {0}\r\n\ttab",
    ]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    command = ["generate", "--prompts", str(prompts), "--model", str(GOLDEN), *SMALL, "--guidance", "1"]
    assert main([*command, "-o", str(tmp_path / "o")]) == 0
    pictures = sorted((tmp_path / "o").glob("0*.png"))
    assert [read_metadata(path)["prompt"] for path in pictures] == texts
    assert [json.loads(x)["prompt"] for x in (tmp_path / "o" / "manifest.jsonl").read_text("utf-8").splitlines()] == texts


def test_a_prompt_file_is_validated_whole(refused: Any, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "good"}\n{"prompt": "x", "widht": 64}\n')
    assert "jobs.jsonl line 2: unknown key 'widht'; did you mean 'width'?" in refused("--prompts", str(jobs))
    jobs.write_text('{"prompt": "good"}\n\n{"prompt": "x", "width": 70}\n')
    message = refused("--prompts", str(jobs))
    assert "jobs.jsonl line 3: height 64 × width 70" in message and "Nearest supported sizes: 64×64" in message
    jobs.write_text('{"prompt": "a", "id": "x/y"}\n{"prompt": "b", "id": "x\\\\y"}\n')
    assert "line 2: its file x-y-0.png is already taken by" in refused("--prompts", str(jobs))


def test_standard_input_is_checked_like_a_file(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\nnot \xff utf-8")))
    assert "standard input line 2: not UTF-8 at byte 9" in refused("--prompts", "-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "standard input holds no prompt" in refused("--prompts", "-")


def test_a_missing_model_folder(refused: Any, tmp_path: Path) -> None:
    message = refused("a", model=tmp_path / "nowhere")
    assert "nowhere" in message and "config.json" in message and "demo" in message


@pytest.mark.parametrize("name", WEIGHTS + CONFIGS)
def test_a_missing_file_is_named(refused: Any, model: Path, name: str) -> None:
    (model / name).unlink()
    message = refused("a", model=model)
    assert f"{name} is missing" in message


def test_missing_text_tokenizer_files_are_named(refused: Any, model: Path) -> None:
    for name in ("tokenizer.json", "added_tokens.json"):
        (model / name).unlink()
    assert "added_tokens.json is missing" in refused("a", model=model)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kept", [0, 5, 100, -7])
def test_a_truncated_file_is_named(refused: Any, model: Path, name: str, kept: int) -> None:
    path = model / name
    path.write_bytes(path.read_bytes()[:kept])
    message = refused("a", model=model)
    assert name in message and "not a whole safetensors file" in message and "download or export it again" in message


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_shapes_are_named(refused: Any, model: Path, name: str) -> None:
    _change(model / name, lambda tensor: np.concatenate([tensor, tensor]))
    message = refused("a", model=model)
    assert "has shape" in message and "expected" in message and (name in message or "model*.safetensors" in message)


def _change(path: Path, change: Any) -> None:
    """Rewrite the first tensor of a file; bfloat16, which numpy lacks, becomes zeros of another type."""
    try:
        tensors = load_file(path)
    except (KeyError, TypeError):
        header_length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + header_length])
        tensors = {k: np.zeros(v["shape"], np.float16) for k, v in header.items() if k != "__metadata__"}
    first = sorted(tensors)[0]
    tensors[first] = change(tensors[first])
    save_file(tensors, path)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"hidden_size": "many"}', "\udcff"])
def test_a_broken_config_is_named(refused: Any, model: Path, name: str, content: str) -> None:
    (model / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert ".json" in refused("a", model=model)


def test_a_shard_index_cannot_point_elsewhere(refused: Any, model: Path) -> None:
    shutil.move(model / "model.safetensors", model.parent / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../x.safetensors" in refused("a", model=model)


def test_an_output_that_is_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "o").write_text("mine")
    for output in (tmp_path / "o", tmp_path / "o" / "deeper"):
        assert main(["generate", "a", "--model", str(GOLDEN), *SMALL, "-o", str(output)]) == 2
        assert "is a file; choose another folder" in capfd.readouterr().err
    assert (tmp_path / "o").read_text() == "mine"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "holds no settings"),
        ({"seed": 1}, "does not say its prompt"),
        ({"prompt": 5}, "a prompt must be a string"),
        ({"prompt": "a", "steps": -1}, "steps = -1"),
        ({"prompt": "a", "seed": "x"}, "seed = 'x'"),
        ({"prompt": "a", "sampler": "magic"}, "sampler 'magic'"),
        ({"prompt": "a", "sampler": ["heun"]}, "sampler ['heun']"),
        ({"prompt": "a", "dtype": "float8"}, "dtype 'float8'"),
        ({"prompt": "a", "quantize": "int9"}, "quantize 'int9'"),
        ({"prompt": "a", "model": 5}, "model = 5"),
        ({"prompt": "a", "lora_fingerprint": 5}, "lora_fingerprint = 5"),
        ({"prompt": "a", "negative_prompt": "b"}, "made with the negative prompt 'b'"),
    ],
)
def test_a_picture_with_bad_settings(refused: Any, tmp_path: Path, metadata: Any, expected: str) -> None:
    from PIL import Image

    write_png(Image.new("RGB", (8, 8)), tmp_path / "p.png", metadata)
    assert expected in refused("--from", str(tmp_path / "p.png"))


def test_a_folder_is_no_picture(refused: Any, tmp_path: Path) -> None:
    assert f"{tmp_path} is no file; give a PNG" in refused("--from", str(tmp_path))


def test_a_picture_of_another_model_asks_for_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    write_png(Image.new("RGB", (8, 8)), tmp_path / "p.png", {"prompt": "a", "model": "big", "model_fingerprint": "0" * 16})
    assert main(["generate", "--from", str(tmp_path / "p.png"), "-o", str(tmp_path / "o")]) == 2
    assert "made with the model 'big'; say where that is with --model DIR" in capfd.readouterr().err
    command = ["generate", "--from", str(tmp_path / "p.png"), "--model", str(GOLDEN), *SMALL, "-o", str(tmp_path / "o")]
    assert main(command) == 0
    assert "bitdance: warning:" in capfd.readouterr().err
