"""What strangers wrote never steers a terminal, and a command whose output or input is closed, full or cut off does its work all
the same: no traceback, and the exit code tells of the work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from strange_folders import GOLDEN, SMALL, change, golden

from bitdance.cli import main
from bitdance.picture import write_png
from stages.cli import data, export, tokenizer, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEERS = "\x1b]0;t\x07\x1b[31m\x07\x08\x7f\x9b2J\u202e\u2066\u2028\u2029\u200b\ufeff\x0b\x0c"
NAME = STEERS.replace("/", "")
FORBIDDEN = set(map(chr, (*range(9), *range(11, 32), *range(127, 160)))) | set("\u202e\u2066\u2028\u2029\u200b\ufeff\r")


def clean(capfd: Any, lines: int | None = None) -> str:
    """What was shown, which holds nothing that steers."""
    shown = capfd.readouterr()
    for text in (shown.out, shown.err):
        assert not set(text) & FORBIDDEN, repr(text)
        assert not any("\ud800" <= letter <= "\udfff" for letter in text)
        assert "Traceback" not in text
    assert lines is None or shown.err.count("\n") == lines, shown.err
    return shown.out + shown.err


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A whole model whose name, card, defaults, prompts, configs and headers are full of what steers a terminal."""
    folder = golden(tmp_path / f"model{NAME}")
    card = {"name": STEERS, "what": STEERS, "figures": [{"what": STEERS, "value": STEERS, "command": STEERS}], "limits": [STEERS]}
    change(folder, "bitdance.json", card=card, prompts=[STEERS], **{STEERS: STEERS})
    change(folder, "bitdance.json", defaults={STEERS: STEERS, "height": 64, "width": 64})
    change(folder, "config.json", **{STEERS: STEERS, "architectures": [STEERS]})
    (folder / f"{NAME}.txt").write_text(STEERS)
    return folder


def test_no_command_shows_what_a_model_folder_says_as_it_is(hostile: Path, tmp_path: Path, capfd: Any) -> None:
    name = str(hostile)
    commands = [["info", name, *more] for more in ([], ["--json"], ["-v"], ["--prompts"], ["--prompts", "--json"])]
    commands += [["verify", name, *more] for more in ([], ["--json"], ["-v"], ["--against", str(GOLDEN)])]
    commands += [["verify", str(GOLDEN), "--against", name], ["sizes", name], ["sizes", name, "--json"]]
    commands += [["doctor", "--model", name, "--device", "cpu", *more] for more in ([], ["--json"])]
    commands += [["bench", "--model", name, "--floor", "1e12,1e12", *more] for more in ([], ["--json"])]
    commands += [["generate", STEERS, "--model", name, *SMALL, "-v", "--grid", "-o", str(tmp_path / f"out{NAME}")]]
    for command in commands:
        assert main(command) in (0, 1), command
        assert clean(capfd), command
    assert export([name, str(tmp_path / f"copy{NAME}")]) == 0
    clean(capfd, 0)
    for text in (tmp_path / f"out{NAME}").glob("*.png"):
        assert not set(text.name) & FORBIDDEN


def test_no_error_shows_what_a_stranger_wrote_as_it_is(hostile: Path, tmp_path: Path, capfd: Any) -> None:
    whole = [("config.json", {"hidden_act": STEERS}), ("config.json", {"model_type": STEERS}), ("ae_config.json", {STEERS: 1})]
    whole += [("vision_head_config.json", {STEERS: 1}), ("tokenizer_config.json", {"tokenizer_class": STEERS})]
    whole += [("bitdance.json", {"card": {"stages": STEERS}}), ("bitdance.json", {"defaults": {"preset": STEERS}})]
    for number, (file, keys) in enumerate(whole):
        folder = Path(shutil.copytree(hostile, tmp_path / f"{number}{NAME}"))
        change(folder, file, **keys)
        order = ["generate", "a", "--model", str(folder), *SMALL, "-o", str(tmp_path / f"out{number}")]
        codes = {main(order), export([str(folder), str(tmp_path / f"x{number}")])}
        assert 2 in codes, (file, keys)
        clean(capfd)
    tensors = load_file(hostile / "vision_head.safetensors")
    save_file({**tensors, STEERS: torch.zeros(2)}, hostile / "vision_head.safetensors")
    for command in (["info", str(hostile)], ["verify", str(hostile)], ["verify", str(hostile), "--json"]):
        assert main(command) in (1, 2)
        assert "\\" in clean(capfd)


def test_no_usage_error_shows_an_argument_as_it_is(tmp_path: Path, capfd: Any) -> None:
    picture, prompts = tmp_path / f"{NAME}.png", tmp_path / f"{NAME}.jsonl"
    write_png(Image.new("RGB", (8, 8)), picture, {"prompt": STEERS, "model": STEERS, "sampler": STEERS, STEERS: STEERS})
    prompts.write_text(json.dumps({"prompt": "a", STEERS: STEERS}))
    bad = [[STEERS], ["generate", "a", f"--{STEERS}"]]
    bad += [["generate", "--prompts", str(prompts)], ["generate", "--from", str(picture)]]
    flags = ("steps", "seed", "shard", "dtype", "device", "sampler", "preset", "model", "lora", "guidance")
    bad += [["generate", "a", f"--{flag}", STEERS] for flag in flags]
    bad += [["generate", f"--{flag}", STEERS] for flag in ("prompts", "from")]
    bad += [[command, STEERS] for command in ("info", "sizes", "verify", "doctor")] + [["verify", "demo", "--seed", STEERS]]
    bad += [["doctor", "--shape", STEERS], ["bench", "--shape", STEERS], ["bench", "--floor", STEERS, "--shape", "mid"]]
    for command in bad:
        assert main(command) == 2, command
        clean(capfd, 1)
    for run in (train, data, tokenizer, export):
        assert run([STEERS]) == 2
        clean(capfd, 1)
    for arguments in (["pack", "folder", STEERS, STEERS], ["inspect", STEERS]):
        assert data(arguments) == 2
        clean(capfd, 1)
    assert train([STEERS, "--set", STEERS]) == 2 and clean(capfd, 1)
    assert export([STEERS, STEERS]) == 2 and clean(capfd, 1)
    for command in (["info", str(picture)], ["info", str(picture), "--json"]):
        assert main(command) == 0 and clean(capfd)


COMMAND = f"'{sys.executable}' -m bitdance"
MAKE = f"{COMMAND} generate a --model '{GOLDEN}' {' '.join(SMALL)} -o out"


def shell(line: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("line", "code", "unbuffered"),
    [
        (f"{MAKE} >&- 2>&- <&-", 0, ""),
        (f"{MAKE} -v >/dev/full", 1, "1"),  # the picture is there, what was to be said of it is not
        (f"{COMMAND} sizes '{GOLDEN}' >/dev/full", 1, ""),
        (f"{COMMAND} sizes '{GOLDEN}' --json | head -1", 0, "1"),
        (f"{COMMAND} generate --prompts - <&-", 2, ""),
        (f"{COMMAND} generate --steps x 2>&-", 2, ""),
        (f"{COMMAND} generate --steps x 2>/dev/full", 2, ""),
        (f"{COMMAND} generate --help | head -1", 0, "1"),
    ],
)
def test_closed_full_and_cut_off_outputs(tmp_path: Path, line: str, code: int, unbuffered: str) -> None:
    found = shell(line, tmp_path, COLUMNS="20", LANG="C", LC_ALL="C", PYTHONUNBUFFERED=unbuffered)
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr, found.stderr
    assert found.returncode == code, (found.returncode, found.stdout, found.stderr)
    assert line.startswith(MAKE) == (tmp_path / "out" / "0000-a-0.png").exists()


def test_a_reader_that_has_gone_ends_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is made, though the first line already finds nobody."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", buffering=1))
    assert main(["generate", "a", "b", "c", "--model", str(GOLDEN), *SMALL, "-v", "--batch-size", "1", "-o", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("0*.png"))) == 3
