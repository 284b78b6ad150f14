"""The command `bitdance`: pictures, manifest, resuming, shards, metadata, signals, exit codes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import bitdance.cli
import bitdance.jobs.outputs
from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.costs.memory import free_main_memory
from bitdance.folder.parts import DEMO
from bitdance.picture import read_metadata

pytestmark = pytest.mark.slow

MODEL = str(Path(__file__).parent / "golden" / "t2i_ckpt")
SMALL = ["--height", "32", "--width", "32", "--steps", "2", "--guidance", "2", "--device", "cpu", "--model", MODEL]
KEYS = ["file", "prompt", "seed", "height", "width", "steps", "guidance", "model", "seconds"]
Call = Callable[..., Any]


def generate(folder: Path, *arguments: str, small: list[str] = SMALL) -> int:
    return main(["generate", *arguments, *small, "-o", str(folder)])


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("0*.png")}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a mistake from here on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("bitdance.kinds.next_patch.load_model", refuse)


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Call], None]:
    """`wrapped(before)` calls before(prompts) ahead of each batch."""
    original = BitDancePipeline.generate

    def install(before: Call) -> None:
        def call(self: BitDancePipeline, prompts: list[str], *options: Any) -> Any:
            before(prompts)
            return original(self, prompts, *options)

        monkeypatch.setattr(BitDancePipeline, "generate", call)

    return install


def test_one_png_and_one_line_per_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "o", "a cat", "ein Häuschen", "--seed", "1", "2", "--grid") == 0
    rows = manifest(tmp_path / "o")
    assert [list(row) for row in rows] == [KEYS] * 4
    assert {row["file"] for row in rows} == {p.name for p in (tmp_path / "o").glob("0*.png")}
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in ("a cat", "ein Häuschen") for s in (1, 2)]
    assert all(row["height"] == row["width"] == 32 and row["steps"] == 2 and row["seconds"] > 0 for row in rows)
    assert Image.open(tmp_path / "o" / "grid.png").size == (68, 68)
    assert not list((tmp_path / "o").glob("*.tmp")) and not (tmp_path / "o" / "failures.jsonl").exists()
    shown = capfd.readouterr()
    assert str(tmp_path / "o" / "grid.png") in shown.out
    assert shown.err == ""  # no bar outside a terminal


def test_the_picture_is_the_one_of_the_pipeline(tmp_path: Path) -> None:
    assert generate(tmp_path, "a cat", "--seed", "7") == 0
    pipe = BitDancePipeline.from_pretrained(MODEL, device="cpu")
    expected = pipe("a cat", 32, 32, num_inference_steps=2, guidance_scale=2.0, seed=7).images[0]
    assert Image.open(tmp_path / "0000-a-cat-7.png").tobytes() == expected.tobytes()


def test_two_runs_give_the_same_files_whatever_the_batch(tmp_path: Path) -> None:
    arguments = ["a cat", "a dog that is longer", "", "--seed", "5"]
    assert generate(tmp_path / "a", *arguments) == generate(tmp_path / "b", *arguments, "--batch-size", "1") == 0
    assert len(sums(tmp_path / "a")) == 3 and sums(tmp_path / "a") == sums(tmp_path / "b")


def test_finished_pictures_are_skipped_without_loading_the_model(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert generate(tmp_path, "a cat") == 0
    before = (tmp_path / "0000-a-cat-0.png").stat().st_mtime_ns
    request.getfixturevalue("no_model")
    assert generate(tmp_path, "a cat") == 0
    assert (tmp_path / "0000-a-cat-0.png").stat().st_mtime_ns == before and len(manifest(tmp_path)) == 1
    with pytest.raises(AssertionError, match="a model was loaded"):
        generate(tmp_path, "a cat", small=[*SMALL, "--steps", "3"])


def test_a_damaged_or_unlisted_picture_is_put_right(tmp_path: Path) -> None:
    assert generate(tmp_path, "a", "b") == 0
    good = sums(tmp_path)
    path = tmp_path / "0000-a-0.png"
    path.write_bytes(path.read_bytes()[:-40])  # metadata still readable, pixels cut
    log = tmp_path / "manifest.jsonl"
    log.write_bytes(log.read_bytes()[:-30])  # a line torn by a kill
    assert generate(tmp_path, "a", "b") == 0
    assert sums(tmp_path) == good
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in (lines[0], *lines[2:])] == [
        "0000-a-0.png",
        "0001-b-0.png",
        "0000-a-0.png",
    ]
    assert json.loads(lines[2])["seconds"] is None


def test_jsonl_keys_win_over_flags(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "x", "id": "own", "height": 48, "seed": 4, "n": 2, "guidance": 1}\n{"prompt": "y"}\n')
    assert generate(tmp_path / "o", "--prompts", str(jobs), "--seed", "9") == 0
    rows = {row["file"]: row for row in manifest(tmp_path / "o")}
    assert sorted(rows) == ["0001-y-9.png", "own-4.png", "own-5.png"]
    assert (rows["own-4.png"]["height"], rows["own-4.png"]["width"], rows["own-4.png"]["guidance"]) == (48, 32, 1.0)
    assert Image.open(tmp_path / "o" / "own-5.png").size == (32, 48)


def test_shards_together_make_everything_once(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\nc\n")
    for shard in ("0/2", "1/2"):
        assert generate(tmp_path / "o", "--prompts", str(prompts), "--shard", shard, "--grid") == 0
    assert sorted(row["file"] for row in manifest(tmp_path / "o")) == ["0000-a-0.png", "0001-b-0.png", "0002-c-0.png"]
    assert generate(tmp_path / "whole", "--prompts", str(prompts)) == 0
    assert sums(tmp_path / "o") == sums(tmp_path / "whole")
    assert (tmp_path / "o" / "grid-1-of-2.png").is_file()


def test_a_picture_of_a_preset_can_be_made_again_from_its_metadata(tmp_path: Path) -> None:
    small = ["--height", "32", "--width", "32", "--guidance", "2", "--device", "cpu", "--model", MODEL]
    said = ["--preset", "balanced", "--guidance-interval", "0.1", "0.7", "--last-steps", "3"]
    assert generate(tmp_path / "a", "a cat", "--seed", "7", *said, small=small) == 0
    (picture,) = (tmp_path / "a").glob("*.png")
    found = read_metadata(picture)
    settings = {name: found[name] for name in ("sampler", "steps", "guidance_interval", "last_steps")}
    assert settings == {"sampler": "dpmpp_2m_sde", "steps": 8, "guidance_interval": [0.1, 0.7], "last_steps": 3}
    assert main(["generate", "--from", str(picture), "--model", MODEL, "--device", "cpu", "-o", str(tmp_path / "b")]) == 0
    assert sums(tmp_path / "a") == sums(tmp_path / "b") != {}


def test_a_picture_can_be_made_again_from_its_metadata(tmp_path: Path) -> None:
    assert generate(tmp_path / "a", "a cat", "--seed", "3") == 0
    picture = tmp_path / "a" / "0000-a-cat-3.png"
    again = ["generate", "--from", str(picture), "--model", MODEL, "--device", "cpu"]
    assert main([*again, "-o", str(tmp_path / "b")]) == 0
    assert sums(tmp_path / "a") == sums(tmp_path / "b")
    assert main([*again, "-o", str(tmp_path / "c"), "--seed", "4", "--width", "48"]) == 0
    assert Image.open(tmp_path / "c" / "0000-a-cat-4.png").size == (48, 32)
    assert main([*again, "-o", str(tmp_path / "d"), "a dog"]) == 0
    row = manifest(tmp_path / "d")[0]
    assert (row["prompt"], row["seed"], row["steps"]) == ("a dog", 3, 2)
    metadata = read_metadata(picture)
    assert metadata["model"] == "t2i_ckpt" and str(tmp_path.parent) not in json.dumps(metadata)


def test_a_broken_job_costs_only_itself(
    tmp_path: Path, wrapped: Callable[[Call], None], capfd: pytest.CaptureFixture[str]
) -> None:
    broken = True

    def before(prompts: list[str]) -> None:
        if broken and "b" in prompts:
            raise RuntimeError("no luck")

    wrapped(before)
    assert generate(tmp_path, "a", "b", "c", "d", "e", "--grid") == 1
    assert sorted(row["prompt"] for row in manifest(tmp_path)) == ["a", "c", "d", "e"]
    failed = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["error"]) for row in failed] == [("b", "RuntimeError: no luck")]
    assert "bitdance: error: 1 of 5 pictures failed: RuntimeError: no luck" in capfd.readouterr().err
    broken = False
    assert generate(tmp_path, "a", "b", "c", "d", "e") == 0
    assert len(sums(tmp_path)) == 5 and not (tmp_path / "failures.jsonl").exists()


def test_a_batch_too_large_for_the_memory_is_halved(tmp_path: Path, wrapped: Callable[[Call], None]) -> None:
    sizes: list[int] = []

    def before(prompts: list[str]) -> None:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("too much")

    wrapped(before)
    assert generate(tmp_path, *"abcdefgh", "--batch-size", "4") == 0
    assert sizes == [4, 2, 2, 2, 2] and len(sums(tmp_path)) == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_saving(
    tmp_path: Path,
    wrapped: Callable[[Call], None],
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def before(prompts: list[str]) -> None:
        if prompts == ["b"]:
            os.kill(os.getpid(), number)

    wrapped(before)
    assert generate(tmp_path, "a", "b", "c", "--batch-size", "1") == code
    assert list(sums(tmp_path)) == ["0000-a-0.png"] and len(manifest(tmp_path)) == 1
    assert f"bitdance: stopped: {number.name} after 1 of 3 pictures" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_while_writing_loses_nothing_that_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_png = bitdance.jobs.outputs.write_png

    def write(*arguments: Any) -> None:
        if not (tmp_path / "manifest.jsonl").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        write_png(*arguments)

    monkeypatch.setattr(bitdance.jobs.outputs, "write_png", write)
    assert generate(tmp_path, "a", "b", "c", "--batch-size", "2") == 143
    assert [row["file"] for row in manifest(tmp_path)] == sorted(sums(tmp_path))
    assert len(sums(tmp_path)) >= 2  # the first batch was decoded when its first picture was written
    assert f"after {len(sums(tmp_path))} of 3 pictures" in capfd.readouterr().err


def test_a_full_disk_ends_the_run_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bitdance.jobs.outputs, "write_png", write)
    assert generate(tmp_path, "a") == 1
    assert "No space left on device" in capfd.readouterr().err


def test_the_memory_is_checked_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_model: None
) -> None:
    monkeypatch.setattr("bitdance.costs.memory.free_main_memory", lambda: 4_000_000)
    assert generate(tmp_path / "o", "a") == 2
    error = capfd.readouterr().err
    assert re.search(r"needs about \d\d MB, 4 MB free on cpu: no option makes it fit", error)
    assert not (tmp_path / "o").exists()


def test_info_tells_the_parts_from_headers(capsys: pytest.CaptureFixture[str], no_model: None) -> None:
    assert main(["info", MODEL, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parts"] == {"backbone": 187_392, "head": 572_680, "projector": 4_736, "tokenizer": 448_971}
    assert (facts["bits_per_token"], facts["downsampling"], facts["patch_side"]) == (8, 8, 2)
    assert facts["files"]["projector.safetensors"] == (Path(MODEL) / "projector.safetensors").stat().st_size
    assert main(["info", MODEL]) == 0
    assert "head: 572,680" in capsys.readouterr().out


def test_info_of_a_tokenizer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None) -> None:
    for name in ("ae_config.json", "ae.safetensors"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["bits_per_token"], facts["downsampling"], facts["bits_per_pixel"]) == (64, 8, 1.0)
    assert facts["parameters"] == 3_742_019 and facts["tokenizer"] == "plain decoder"


def test_info_shows_how_a_picture_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path, "a cat") == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "0000-a-cat-0.png"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["prompt"], facts["seed"], facts["steps"]) == ("a cat", 0, 2)


def test_info_prints_the_card_and_the_prompts_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path(MODEL).iterdir():
        (tmp_path / file.name).hardlink_to(file)
    extras = {
        "defaults": {"height": 64, "width": 64},
        "sizes": [[64, 64], [32, 64]],
        "prompts": {"things": ["a cat", "a dog"]},
        "card": {"licence": "MIT"},
    }
    (tmp_path / "bitdance.json").write_text(json.dumps(extras))
    assert main(["info", str(tmp_path)]) == 0
    assert "licence: MIT" in capsys.readouterr().out
    assert main(["info", str(tmp_path), "--prompts"]) == 0
    assert capsys.readouterr().out.splitlines() == ["things:", "  a cat", "  a dog"]
    assert main(["sizes", str(tmp_path), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert sizes["default"] == [64, 64] and sizes["sizes"] == [[32, 64], [64, 64]] and sizes["only_these"] is True


def test_sizes_says_what_else_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sizes", MODEL]) == 0
    shown = capsys.readouterr().out
    assert "1024×1024 (default)" in shown and "multiples of 16" in shown


def test_doctor_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__ and found["devices"][0]["device"] == "cpu"
    assert set(found["optional"]) >= {"flash_attn", "deepspeed", "webdataset"}
    assert main(["doctor"]) == 0
    assert "free memory" in capsys.readouterr().out


def test_free_memory_respects_a_container(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert free_main_memory(tmp_path) == 8_192_000
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, content in {
        "memory.max": "5000\n",
        "memory.current": "3000\n",
        "memory.stat": "anon 1\ninactive_file 500\n",
    }.items():
        (group / name).write_text(content)
    assert free_main_memory(tmp_path) == 2500
    (group / "memory.max").write_text("max\n")
    assert free_main_memory(tmp_path) == 8_192_000


def test_training_commands_come_from_entry_points(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []
    command = ModuleType("a_training_package")
    command.train = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_training_package", command)
    entry = EntryPoint("train", "a_training_package:train", bitdance.cli.GROUP)
    monkeypatch.setattr(bitdance.cli, "entry_points", lambda group: [entry])
    assert main(["--help"]) == 0
    assert "train a tokenizer or a generator" in capsys.readouterr().out
    assert main(["train", "x.toml", "--dry-run"]) == 7 and seen == [["x.toml", "--dry-run"]]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry = EntryPoint("data", "a_module_that_is_not_there:data", bitdance.cli.GROUP)
    monkeypatch.setattr(bitdance.cli, "entry_points", lambda group: [entry])
    assert main(["data", "pack"]) == 2
    assert "pip install 'bitdance[train]'" in capsys.readouterr().err
    assert main(["train", "x"]) == 2
    assert "not registered here" in capsys.readouterr().err


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["--version"]) == 0 and main(["generate", "--help"]) == 0
    assert f"bitdance {bitdance.__version__}" in capsys.readouterr().out
    assert main(["generat", "x"]) == 2
    assert capsys.readouterr().err.startswith("bitdance: error: unknown command 'generat'; did you mean 'generate'?")


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's allocator is told")
def test_a_command_keeps_the_memory_that_it_frees() -> None:
    code = """if True:
        import resource, sys, torch
        from bitdance.cli.memory import keep_freed_memory
        if sys.argv[1] == "kept":
            keep_freed_memory()
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print([faults() for _ in range(20)][-1])"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(how: str, **more: str) -> int:
        done = subprocess.run([sys.executable, "-c", code, how], env=plain | more, capture_output=True, text=True, check=True)
        return int(done.stdout)

    if faults("plain") < 10_000:
        pytest.skip("this allocator keeps large pieces anyway")
    assert faults("kept") < 1000
    assert faults("kept", MALLOC_ARENA_MAX="2") > 10_000  # whoever sets one is not overruled
