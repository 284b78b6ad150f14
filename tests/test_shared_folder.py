"""Several commands, killed commands and planted links in one output folder: a picture is whole or absent, has one line of the
manifest, and nothing outside of the folder is touched."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from strange_folders import GOLDEN, SMALL

from bitdance.cli import main
from bitdance.jobs.job import Job
from bitdance.jobs.outputs import OutputFolder
from lfq_tokenizer.lock import FolderLock

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
COMMAND = ["generate", "--model", str(GOLDEN), *SMALL]


def start(*arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-m", "bitdance", *COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def prompts(folder: Path, count: int) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"picture {i}\n" for i in range(count)))
    return path


def check(out: Path, count: int) -> None:
    """Every picture is whole and has one line; nothing else is there."""
    names = Counter(json.loads(line)["file"] for line in (out / "manifest.jsonl").read_text().splitlines())
    pictures = sorted(out.glob("0*.png"))
    assert len(pictures) == count and names == Counter({path.name: 1 for path in pictures})
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
    others = {path.name for path in out.iterdir()} - set(names) - {"manifest.jsonl", ".lock"}
    assert not others, others


def wait_for(what: Any, process: subprocess.Popen[str]) -> None:
    while not what() and process.poll() is None:
        time.sleep(0.01)


def test_of_two_commands_one_works_and_the_other_names_it(tmp_path: Path) -> None:
    file, out = prompts(tmp_path, 6), tmp_path / "out"
    one, other = (start("--prompts", file, "--batch-size", 1, "-o", out) for _ in range(2))
    said = {process: process.communicate() for process in (one, other)}
    codes = sorted(process.returncode for process in (one, other))
    assert codes in ([0, 0], [0, 2]), said  # both, where one began after the other had ended
    if codes == [0, 2]:
        loser, winner = (one, other) if one.returncode == 2 else (other, one)
        message = said[loser][1]
        assert f"{out} is in use by process {winner.pid} on " in message and message.count("\n") == 1, message
    check(out, 6)


def test_after_a_kill_the_same_command_finishes_and_clears(tmp_path: Path) -> None:
    file, out = prompts(tmp_path, 6), tmp_path / "out"
    killed = start("--prompts", file, "--batch-size", 1, "-o", out)
    wait_for(lambda: len(list(out.glob("0*.png"))) >= 1, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    (out / f".0003-x.png.incomplete-{os.uname().nodename}-text").write_text("of somebody else")
    dead = subprocess.run([sys.executable, "-c", LEAVE, str(out)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert dead.returncode == -signal.SIGKILL and len(list(out.glob(".late*.incomplete-*"))) == 1
    assert main([*COMMAND, "--prompts", str(file), "-o", str(out)]) == 0
    (out / f".0003-x.png.incomplete-{os.uname().nodename}-text").unlink()  # a name of another form stays
    check(out, 6)
    assert all((out / name).stat().st_mtime_ns == made for name, made in before.items())


LEAVE = """
import os, signal, sys
from pathlib import Path
from lfq_tokenizer.files import whole_file
with whole_file(Path(sys.argv[1]) / "late.png") as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_shards_share_a_folder_and_keep_a_whole_run_out(tmp_path: Path, capfd: Any) -> None:
    file, out = prompts(tmp_path, 4), tmp_path / "out"
    shards = [start("--prompts", file, "--batch-size", 1, "--shard", f"{i}/2", "-o", out) for i in range(2)]
    for process in shards:
        said = process.communicate()
        assert process.returncode == 0, said
    check(out, 4)
    order = [*COMMAND, "--prompts", str(file), "-o", str(out)]
    with OutputFolder(out, "golden", (0, 2)).held():
        assert main(order) == 2 and "is in use" in capfd.readouterr().err
        assert main([*order, "--shard", "0/2"]) == 2 and f"process {os.getpid()}" in capfd.readouterr().err
        assert main([*order, "--shard", "1/2"]) == 0
    with OutputFolder(out, "golden").held():
        assert main([*order, "--shard", "0/2"]) == 2 and f"process {os.getpid()}" in capfd.readouterr().err
    assert main(order) == 0


@pytest.mark.parametrize("name", ["{}", "{}.tmp", "manifest.jsonl", "failures.jsonl", "grid.png", ".lock"])
@pytest.mark.parametrize("kind", ["file", "nothing", "folder"])
def test_a_planted_link_leads_nowhere(tmp_path: Path, name: str, kind: str, capfd: Any) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    if kind == "folder":
        victim.mkdir()
    elif kind == "file":
        victim.write_text("mine")
    planted = out / name.format("0000-a-0.png")
    planted.symlink_to(victim)
    code = main([*COMMAND, "a", "--grid", "-o", str(out)])
    assert code in (0, 1, 2) and "Traceback" not in capfd.readouterr().err
    assert victim.exists() == (kind != "nothing")
    assert kind != "file" or victim.read_text() == "mine"
    assert kind != "folder" or not list(victim.iterdir())
    if name not in ("manifest.jsonl", ".lock"):  # what is opened, not replaced, is refused; the others are ours
        assert code == 0 and not list(out.glob(".*incomplete*"))
        assert (out / "0000-a-0.png").is_file() and not (out / "0000-a-0.png").is_symlink()
        assert not (out / "grid.png").is_symlink()


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_modes_of_an_output_folder_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert main([*COMMAND, "a", "b", "--grid", "-o", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(found) == 4 and set(found.values()) == {0o666 & ~mask}, found
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_what_stands_in_the_way_is_named(tmp_path: Path, capfd: Any) -> None:
    for name in ("0000-a-0.png", "manifest.jsonl", ".lock"):
        out = tmp_path / name.strip(".")
        (out / name).mkdir(parents=True)
        (out / name / "mine").write_text("mine")
        assert main([*COMMAND, "a", "-o", str(out)]) in (1, 2)
        said = capfd.readouterr().err
        assert name in said and said.count("\n") == 1 and (out / name / "mine").read_text() == "mine"


def test_a_lock_says_who_holds_it_in_words_that_steer_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bitdance", "\x1b[31m\u202e"])
    with FolderLock(tmp_path), pytest.raises(ValueError) as error, FolderLock(tmp_path):
        pass
    assert "\x1b" not in str(error.value) and "\u202e" not in str(error.value)


def test_a_torn_manifest_loses_no_picture(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*COMMAND, "a", "b", "-o", str(out)]) == 0
    manifest = out / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40] + b'\n{"file": ["x"]}\n[1]\n\xff\xfe\n' + b"[" * 100_000)
    assert main([*COMMAND, "a", "b", "-o", str(out)]) == 0
    names = []
    for line in manifest.read_bytes().split(b"\n"):
        try:
            names.append(json.loads(line)["file"])
        except (ValueError, TypeError, RecursionError):
            continue
    assert Counter(name for name in names if isinstance(name, str)) == Counter({"0000-a-0.png": 1, "0001-b-0.png": 1})


def test_a_disk_that_takes_half_a_line_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and the next run lists the picture, which is whole."""
    folder, write = OutputFolder(tmp_path, "golden"), os.write
    job = Job(0, "a.png", "p", 1, 64, 64, 2, 1.0)
    with folder.held():
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
            with pytest.raises(OSError, match="No space left on device.*manifest"):
                folder.save(job, Image.new("RGB", (8, 8)), {"job_hash": "hash"}, 1.0)
        assert folder.missing([job], lambda job: "hash") == []
    assert json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[-1])["file"] == "a.png"


def test_the_same_job_is_known_whoever_wrote_its_row(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, "golden")
    job = Job(0, "a.png", "p", 1, 64, 64, 2, 1.0)
    with folder.held():
        assert folder.missing([job], lambda job: "hash") == [job]
        folder.save(job, Image.new("RGB", (8, 8)), {"job_hash": "hash"}, 1.0)
    with OutputFolder(tmp_path, "golden").held():
        again = OutputFolder(tmp_path, "golden")
        assert again.is_done(job, "hash") and not again.is_done(job, "other")
