"""A number means the same whichever door it comes through, flag, JSONL, picture, Python, bitdance.json: all take it, or all
refuse it in the same words."""

import contextlib
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from strange_folders import GOLDEN, change

import bitdance.pipeline
from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.cli.generate import parser, read_spec
from bitdance.folder.config import check_folder
from bitdance.heads.diffusion.settings import Sampling, choose
from bitdance.picture import write_png
from bitdance.values import RANGES, check_number, from_text
from lfq_tokenizer.json_file import parse_json

pytestmark = pytest.mark.slow

FIELDS = ("seed", "height", "width", "steps", "guidance", "last_steps", "n")
ODD: tuple[Any, ...] = (
    *(10**400, 10**5000, -(10**5000), 2**64, 2**63, 2**63 - 1, -1, 0, 1, 64, 100_001, 65_537, 10_001),
    *(1e308, -1e308, math.nan, math.inf, -math.inf, -0.0, 0.5, 2.0, 1000.5, True, False, None),
    *("7", "", "१२", " 5", "1_0", "0x7", "\x1b[31m", [1], {}, [[[[[[]]]]]], "9" * 5000),
)
VALUES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5)


class Accepted(Exception):
    """An order went through."""


def json_of(value: Any) -> str:
    """As json.dumps, and numbers of any length."""
    if type(value) is int and abs(value) > 10**4000:
        return ("-" if value < 0 else "") + "1" + "0" * 5000
    return json.dumps(value)


def flag_text(value: Any) -> str | None:
    """How a flag says it; None where it cannot, as a text means what its letters mean."""
    return json_of(value) if type(value) in (int, float) and not (isinstance(value, float) and not math.isfinite(value)) else None


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`doors(name, value)` → door → "" where it takes the value, else its words after the source."""
    home = tmp_path_factory.mktemp("doors")
    folder = Path(shutil.copytree(GOLDEN, home / "model"))
    pipe, checked = BitDancePipeline.from_pretrained(folder, "cpu"), check_folder(folder)

    def stop(*_: Any, **__: Any) -> None:
        raise Accepted

    def order(*arguments: str) -> None:
        options = parser().parse_intermixed_args(["--model", str(folder), "--device", "cpu", *arguments])
        read_spec(options)

    def python(name: str, value: Any) -> None:
        said = {"steps": "num_inference_steps", "guidance": "guidance_scale", "n": "num_images_per_prompt"}.get(name, name)
        if value is None:
            raise Accepted  # nothing was said
        with contextlib.suppress(Accepted):
            pipe("a", **{"height": 64, "width": 64, said: value})

    def flag(name: str, value: Any) -> None:
        order("a", f"--{ {'n': 'images-per-prompt'}.get(name, name.replace('_', '-')) }={flag_text(value)}", *size(name))

    def size(name: str) -> list[str]:
        return [f"--{side}=64" for side in ("height", "width") if side != name]

    def jsonl(name: str, value: Any) -> None:
        path = home / "jobs.jsonl"
        path.write_text(f'{{"prompt": "a", "{name}": {json_of(value)}}}\n')
        order("--prompts", str(path), *size(name))

    def png(name: str, value: Any) -> None:
        said = {"prompt": '"a"', "height": "64", "width": "64", name: json_of(value)}
        text = "{" + ", ".join(f'"{key}": {content}' for key, content in said.items()) + "}"
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr("bitdance.picture.json.dumps", lambda *_, **__: text)
            write_png(Image.new("RGB", (8, 8)), home / "p.png", {})
        order("--from", str(home / "p.png"))

    def sampling(name: str, value: Any) -> None:
        if value is None:
            raise Accepted
        Sampling(**{name: value})

    def defaults(name: str, value: Any) -> None:
        if value is None:
            raise Accepted
        choose({{"steps": "num_inference_steps", "guidance": "guidance_scale"}[name]: value})

    ways: dict[str, Callable[[str, Any], None]] = {"python": python, "flag": flag, "jsonl": jsonl, "png": png}
    ways |= {"sampling": sampling, "defaults": defaults}
    has = {
        "flag": set(FIELDS),
        "jsonl": {"seed", "height", "width", "steps", "guidance", "n"},
        "png": set(FIELDS) - {"n"},
        "python": set(FIELDS),
        "sampling": {"steps", "guidance", "last_steps"},
        "defaults": {"steps", "guidance"},
    }

    def ask(name: str, value: Any) -> dict[str, str]:
        found = {}
        for door, way in ways.items():
            silent = flag_text(value) is None if door == "flag" else value is None and door in ("jsonl", "png")
            several = door == "python" and name == "seed" and isinstance(value, list)  # one for each picture
            if name not in has[door] or silent or several:
                continue
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(bitdance.pipeline, "generate_bits", stop)
                    patch.setattr("bitdance.kinds.next_patch.check_folder", lambda folder: checked)
                    patch.setattr("bitdance.kinds.next_patch.fingerprint", lambda folder: "0" * 16)
                    way(name, value)
                found[door] = ""
            except Accepted:
                found[door] = ""
            except ValueError as error:
                found[door] = words(str(error), name)
        return found

    return ask


def words(message: str, name: str) -> str:
    """From "NAME = VALUE; …" or from "height H × width W …" on, without the value, which each door shows as it was written."""
    assert "\n" not in message and "\x1b" not in message, message
    if found := re.search(r"height \d+ × width \d+ is not supported.*", message):
        return found.group()
    names = f"{name}|num_inference_steps|guidance_scale|num_images_per_prompt"
    found = re.search(rf"(?:^|[ :])(?:{names}) = .*?; (.*is allowed.*)$", message)
    assert found, (name, message)
    assert len(message) < 400, message
    return found.group(1)


@given(name=st.sampled_from(FIELDS), value=VALUES)
@settings(max_examples=150, deadline=None)
@example(name="guidance", value=math.nan)
@example(name="seed", value=10**5000)
@example(name="steps", value=True)
@example(name="guidance", value=-0.0)
@example(name="height", value=10**400)
@example(name="n", value=1e308)
def test_all_doors_take_a_number_or_refuse_it_in_the_same_words(doors: Any, name: str, value: Any) -> None:
    found = doors(name, value)
    assert found and len(set(found.values())) == 1, found


@given(name=st.sampled_from(sorted(RANGES)), value=VALUES)
@settings(max_examples=300, deadline=None)
def test_what_text_means_is_what_json_means(name: str, value: Any) -> None:
    text = flag_text(value)
    if text is None:
        return

    def result(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ValueError as error:
            return re.sub(r" = .*?;", ";", str(error))

    parsed = parse_json(text, "there", checked_later=True)
    assert result(lambda: from_text(name, text, "")) == result(lambda: check_number(name, parsed))


FLAGS = {
    "generate": ("seed", "height", "width", "steps", "guidance", "last-steps", "images-per-prompt", "batch-size", "lora-scale"),
    "bench": ("height", "width", "steps", "guidance", "batch", "repeats", "threads"),
    "doctor": ("height", "width", "batch-size", "guidance"),
    "verify": ("seed", "height", "width", "steps", "pictures", "tolerance", "at-least"),
}
BAD = ("-1001", "NaN", "inf", "-Infinity", "१२", " 5", "1_0", "", "0x7", "1e309", "9" * 5000, "7\x1b[31m", "\u202e7", "True")


@pytest.mark.parametrize("command", FLAGS)
def test_a_bad_flag_is_one_line_and_exit_code_2(command: str) -> None:
    start = {"generate": ["a", "--model", str(GOLDEN)], "verify": [str(GOLDEN), "--against", str(GOLDEN)]}.get(command, [])
    lora = {"lora-scale": ["--lora", "nowhere"]}
    for flag in FLAGS[command]:
        for text in BAD:
            errors, out = io.StringIO(), io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
                code = main([command, *start, *lora.get(flag, []), f"--{flag}={text}"])
            said = errors.getvalue()
            assert (code, out.getvalue()) == (2, ""), (flag, text, said)
            assert said.count("\n") == 1 and len(said) < 500 and "Traceback" not in said, said
            assert not set(said[:-1]) & {chr(code) for code in (*range(32), *range(127, 160), 0x202E)}, said
            if flag != "lora-scale":
                assert flag.replace("-", "_") in said or f"--{flag}" in said, said


@pytest.mark.parametrize("key", ["num_inference_steps", "guidance_scale", "height", "width"])
def test_defaults_of_a_model_are_checked_by_every_command(tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
    for value in (10**400, -1, True, "7", [1], {}, "१२"):
        change(folder, "bitdance.json", defaults={key: value})
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            assert main(["info", str(folder)]) == 2
        said = errors.getvalue()
        assert "bitdance.json" in said and "is allowed" in said and said.count("\n") == 1, said
