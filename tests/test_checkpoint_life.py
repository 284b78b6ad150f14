"""A training checkpoint is whole or absent: whatever fails while saving, an earlier one can be loaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfq_tokenizer import files
from stages.engine import checkpoint
from stages.engine.checkpoint import INCOMPLETE, complete, find, model_folder, newest, save, step_folder, verify
from stages.engine.run_folder import owned

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


class Killed(BaseException):
    """Stands for the end of the process: nothing that is written here may catch it."""


def writer(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "resume").mkdir()
        (folder / "resume" / "state.pt").write_bytes(bytes([step % 256]) * 100)
        (folder / "model.safetensors").write_text(f"weights of step {step}")

    return write


def saved(run: Path, step: int, keep: int = 2) -> Path:
    return save(run, step, writer(step), keep)


def content(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def test_a_checkpoint_holds_what_was_written_and_a_list_of_it(tmp_path):
    folder = saved(tmp_path, 5)
    assert folder == step_folder(tmp_path, 5) == tmp_path / "step_00000005"
    assert verify(folder) == 5
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 5 and sorted(manifest["files"]) == ["model.safetensors", "resume/state.pt"]
    assert manifest["files"]["resume/state.pt"]["bytes"] == 100
    assert (tmp_path / "latest").read_text() == "step_00000005\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000005"]


# Where a save can be cut off. Each is (name, function that arranges it).


def _raise(*_: Any, **__: Any) -> None:
    raise Killed


def cut_before_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    return _raise


def cut_while_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise Killed

    return write


def disk_full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    return write


def _patched(name: str) -> Callable[[pytest.MonkeyPatch], Callable[[Path], None]]:
    def arrange(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
        monkeypatch.setattr(checkpoint, name, _raise)
        return writer(2)

    return arrange


def _replace(target: str) -> Callable[[pytest.MonkeyPatch], Callable[[Path], None]]:
    """Cut off at the rename to the name `target`."""

    def arrange(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
        original = os.replace

        def replace(source: Any, destination: Any) -> None:
            if Path(destination).name == target:
                raise Killed
            original(source, destination)

        monkeypatch.setattr(os, "replace", replace)
        return writer(2)

    return arrange


CUTS = {
    "before writing": (cut_before_writing, 1),
    "while writing": (cut_while_writing, 1),
    "disk full": (disk_full, 1),
    "while hashing": (_patched("sha256"), 1),
    "while listing": (_patched("write_json"), 1),
    "list written, not renamed": (_replace("manifest.json"), 1),
    "before the files are on disk": (_patched("fsync"), 1),
    "at the rename": (_replace("step_00000002"), 1),
    "at the pointer": (_replace("latest"), 1),  # step 2 is published, and `latest` still names the one before
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_anywhere_leaves_the_previous_checkpoint_and_the_next_save_clears_up(tmp_path, monkeypatch, name):
    arrange, expected = CUTS[name]
    saved(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises((Killed, OSError)):
        save(tmp_path, 2, arrange(patch), keep=2)
    found = find("auto", tmp_path)
    assert found is not None and verify(found) == expected and content(found) == f"weights of step {expected}"
    assert newest(tmp_path) == found and model_folder(tmp_path) == found / "model"
    for folder in complete(tmp_path):
        verify(folder)

    saved(tmp_path, 2)
    assert [verify(folder) for folder in complete(tmp_path)] == [1, 2]
    assert find("auto", tmp_path) == step_folder(tmp_path, 2)
    assert list(tmp_path.glob("*.incomplete*")) == [] and list(tmp_path.glob("*.tmp")) == []


def test_a_cut_while_pruning_loses_only_what_was_to_go(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    original = shutil.rmtree

    def half(path: Path, *arguments: Any, **options: Any) -> None:
        if "step_00000001" in path.name:
            (path / "model.safetensors").unlink()
            raise Killed
        original(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", half)
        saved(tmp_path, 3)
    assert [verify(folder) for folder in complete(tmp_path)] == [2, 3]  # no half checkpoint has a checkpoint's name
    saved(tmp_path, 4)
    assert [verify(folder) for folder in complete(tmp_path)] == [3, 4]


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=99))
    with pytest.raises(ValueError, match=r"step_00000002 needs \d+\.\d kB and the disk has 99 bytes free; make room first"):
        save(tmp_path, 2, lambda folder: pytest.fail("it wrote"), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"] and verify(step_folder(tmp_path, 1)) == 1
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    assert verify(saved(tmp_path, 2)) == 2


KILLED = """
import os, sys
from pathlib import Path
from stages.engine.checkpoint import save

def write(folder):
    (folder / "model.safetensors").write_text("half")
    os._exit(9)

save(Path(sys.argv[1]), 2, write, 2)
"""


def test_what_a_killed_run_was_writing_is_no_checkpoint_and_the_next_run_clears_it(tmp_path):
    saved(tmp_path, 1)
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT).returncode == 9
    (left,) = tmp_path.glob(".step_00000002" + INCOMPLETE + "*")
    assert [verify(folder) for folder in complete(tmp_path)] == [1]
    (left / "manifest.json").write_text('{"step": 2, "files": {}}')  # even when its list is there
    with pytest.raises(ValueError, match="not a finished checkpoint"):
        verify(left)
    # of another machine that shared the disk, of an earlier version, and of an export that is still at work
    (tmp_path / ".step_00000003.incomplete-0123abcd-1-2-3").mkdir()
    (tmp_path / "step_00000004.incomplete").mkdir()
    export = files.temporary_beside(tmp_path / "model")
    export.mkdir()
    with owned(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([export.name, ".lock", "latest", "step_00000001"])
    assert not (tmp_path / ".lock").exists()


def test_a_checkpoint_can_be_read_by_whom_the_umask_lets(tmp_path):
    def write(folder: Path) -> None:
        writer(1)(folder)
        (folder / "model.safetensors").chmod(0o600)  # as transformers does
        (folder / "resume").chmod(0o700)

    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1, write, keep=1)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {path for path, mode in modes.items() if mode == 0o750} == {"step_00000001", "step_00000001/resume"}
    assert {mode for path, mode in modes.items() if (tmp_path / path).is_file()} == {0o640} and verify(folder) == 1


def test_no_link_that_lies_in_wait_is_written_through(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_text("mine")
    for name in ("latest", "latest.tmp", "step_00000001.incomplete", "metrics.jsonl.tmp", "config.json.tmp"):
        (run / name).symlink_to(outside)
    saved(run, 1)
    assert outside.read_text() == "mine" and (run / "latest").read_text() == "step_00000001\n"


def test_a_checkpoint_of_the_same_step_stays_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    saved(tmp_path, 2, keep=1)
    original, to_it = os.replace, 0

    def replace(source: Any, destination: Any) -> None:
        nonlocal to_it
        to_it += Path(destination).name == "step_00000002"
        if to_it == 1 and Path(destination).name == "step_00000002":  # the new one; the second brings the old one back
            raise OSError("no")
        original(source, destination)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr("lfq_tokenizer.files._exchange", lambda one, other: False)  # a system that cannot exchange two names
        patch.setattr(os, "replace", replace)
        save(tmp_path, 2, writer(9), keep=1)
    assert verify(find("auto", tmp_path)) == 2 and content(find("auto", tmp_path)) == "weights of step 2"
    save(tmp_path, 2, writer(9), keep=1)
    assert content(find("auto", tmp_path)) == "weights of step 9" and verify(find("auto", tmp_path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002"]


def test_keep_newest_ones(tmp_path):
    for step in (1, 2, 3, 10):
        saved(tmp_path, step, keep=3)
    assert [verify(folder) for folder in complete(tmp_path)] == [2, 3, 10]


@pytest.mark.parametrize("keep", [1, 2])
def test_going_on_from_an_older_step_is_not_disturbed_by_later_ones(tmp_path, keep):
    for step in (500, 1000):
        saved(tmp_path, step, keep=2)
    for step in (100, 200):  # a run that was started again in the same folder
        saved(tmp_path, step, keep=keep)
        assert verify(find("auto", tmp_path)) == step == verify(newest(tmp_path))
    assert [verify(folder) for folder in complete(tmp_path)] == [100, 200][-keep:] + [500, 1000]


def damage_content(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_content, "resume/state.pt has another SHA-256"),
        (lambda path: path.write_bytes(b"short"), "resume/state.pt has 5 bytes, expected 100"),
        (lambda path: path.unlink(), "resume/state.pt is missing"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    folder = saved(tmp_path, 1)
    damage(folder / "resume" / "state.pt")
    with pytest.raises(ValueError, match="damaged") as caught:
        verify(folder)
    assert str(folder) in str(caught.value) and message in str(caught.value) and "model.safetensors" not in str(caught.value)


def test_the_first_ten_damaged_files_are_listed(tmp_path):
    def write(folder: Path) -> None:
        for i in range(12):
            (folder / f"f{i:02d}").write_text("x")

    folder = save(tmp_path, 1, write, keep=1)
    for i in range(12):
        (folder / f"f{i:02d}").unlink()
    with pytest.raises(ValueError) as caught:
        verify(folder)
    assert str(caught.value).count("is missing") == 10


def test_a_broken_list_is_named(tmp_path):
    folder = saved(tmp_path, 1)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError) as caught:
        verify(folder)
    assert str(folder / "manifest.json") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        '{"step": 1}',
        '{"step": 1, "files": []}',
        '{"step": 1, "files": {"x": 5}}',
        '{"step": 1, "files": {"x": {"bytes": 1}}}',
        '{"step": 1, "files": {"x": {"bytes": "1", "sha256": "0"}}}',
        '{"step": true, "files": {}}',
        '{"step": 1e400, "files": {}}',
        '{"step": 1' + "0" * 400 + ', "files": {}}',
        '{"files": {}}',
        '{"step": 1, "files": {"../step_00000002/x": {"bytes": 1, "sha256": "0"}}}',
        '{"step": 1, "files": {"/etc/hostname": {"bytes": 1, "sha256": "0"}}}',
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_a_list_of_another_shape_is_named(tmp_path, text):
    folder = saved(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        verify(folder)
    assert str(folder / "manifest.json") in str(caught.value)


def test_what_resume_means(tmp_path):
    assert find("auto", tmp_path / "none") is None and find("auto", tmp_path) is None
    first = saved(tmp_path, 1)
    second = saved(tmp_path, 2)
    assert find("auto", tmp_path) == second
    assert find("no", tmp_path) is None
    assert find(str(first), tmp_path) == first
    with pytest.raises(FileNotFoundError, match="step_00000007.*'auto', 'no' or a folder"):
        find(str(tmp_path / "step_00000007"), tmp_path)
    (tmp_path / "latest").write_text("../elsewhere/step_00000001\n")  # only names inside the run count
    assert find("auto", tmp_path) == first
    (tmp_path / "latest").write_text("step_00000099\n")
    assert find("auto", tmp_path) == second


def test_a_model_is_named_by_its_run_its_checkpoint_or_its_folder(tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    plain.mkdir()
    first = saved(run, 1)
    second = saved(run, 2)
    assert newest(first) == first and newest(run) == second
    assert model_folder(run) == second / "model" and model_folder(first) == first / "model"
    assert model_folder(str(plain)) == plain
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor a run"):
        newest(plain)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        model_folder(tmp_path / "none")
