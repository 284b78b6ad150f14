"""A run has its folder for itself, whoever else wants it and however its owner ended; nothing is left or told twice."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_engine import LineRecipe, config, metrics

from lfq_tokenizer import files, weights
from stages.engine import checkpoint, processes, run_folder
from stages.engine.loop import train
from stages.engine.run_folder import owned
from stages.engine.tracker import Tracker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

# other processes
HOLD = """
import sys, time
from pathlib import Path
from stages.engine.run_folder import owned

with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
HOLD_WITH_LOADER = """
import os, sys, time
from pathlib import Path
from stages.engine.run_folder import owned

with owned(Path(sys.argv[1])):
    if (loader := os.fork()) == 0:
        time.sleep(60)
    print(loader, flush=True)
    time.sleep(60)
"""
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"  # and wait for it, as torchrun does


def child(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | variables
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def ended() -> Iterator[list[Any]]:
    """Processes that are ended with the test, whatever happens."""
    started: list[Any] = []
    yield started
    for process in started:
        number = process.pid if isinstance(process, subprocess.Popen) else process
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        if isinstance(process, subprocess.Popen):
            process.wait()
            process.stdout.close()


def test_a_second_run_is_refused_and_told_who_has_the_folder(
    tmp_path: Path, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended.append(owner := child(HOLD, tmp_path, 60))
    assert line_of(owner) == "held"
    with pytest.raises(ValueError, match="is in use by process") as caught:
        train(LineRecipe(), config(tmp_path))
    said = str(caught.value)
    assert str(tmp_path) in said and str(owner.pid) in said and socket.gethostname() in said and f"`kill {owner.pid}`" in said
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    with monkeypatch.context() as patch:  # patience with one that is to end and does not has an end too
        patch.setattr(run_folder, "_orphan", lambda owner: True)
        patch.setattr(run_folder, "PATIENCE", 0.3)
        with pytest.raises(ValueError, match=f"is in use by process {owner.pid}"), owned(tmp_path):
            pass

    owner.kill()  # a dead owner is nobody's concern
    owner.wait()
    assert train(LineRecipe(), config(tmp_path, steps=1)) == 0
    assert not (tmp_path / ".lock").exists()


def test_loaders_of_a_killed_trainer_do_not_keep_its_folder(tmp_path: Path, ended: list[Any]) -> None:
    ended.append(owner := child(HOLD_WITH_LOADER, tmp_path))
    ended.append(loader := int(line_of(owner)))
    owner.kill()
    owner.wait()
    os.kill(loader, 0)  # it lives on
    with owned(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_run_whose_launcher_was_killed_is_waited_for(
    tmp_path: Path, ended: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ended.append(launcher := child(LAUNCH, HOLD, tmp_path, 2, RANK="0"))
    assert line_of(launcher) == "held"  # by its child
    worker = json.loads((tmp_path / ".lock").read_text())
    ended.append(worker["pid"])
    assert worker["launcher"] == launcher.pid
    launcher.kill()
    launcher.wait()
    with owned(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert f"process {worker['pid']}" in said and "whose launcher is gone: it saves and ends; waiting for it" in said


def test_a_worker_notices_that_its_launcher_is_gone_saves_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LAUNCHER", os.getppid())
    recipe = LineRecipe()
    recipe.feed.before[2] = lambda: monkeypatch.setattr(os, "getppid", lambda: 1)
    assert train(recipe, config(tmp_path)) == 128 + signal.SIGTERM
    assert checkpoint.verify(checkpoint.step_folder(tmp_path, 3)) == 3


def test_only_a_launcher_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that a shell started in the background goes on when the shell ends, as nohup has it."""
    monkeypatch.delenv("RANK", raising=False)
    assert processes._launcher() is None
    monkeypatch.setenv("RANK", "0")
    (name,) = Path(f"/proc/{os.getppid()}/comm").read_text().split("\n")[:1]
    monkeypatch.setattr(processes, "SHELLS", ())
    assert processes._launcher() == os.getppid()
    monkeypatch.setattr(processes, "SHELLS", (name.split(":")[0],))
    assert processes._launcher() is None


def test_the_folder_is_free_after_whatever_ended_a_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        train(LineRecipe(broken=frozenset(range(10))), config(tmp_path))
    with owned(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


# what a run reports


def test_every_step_is_reported_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(LineRecipe(), config(tmp_path, steps=4, save_every=2))
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss"')  # a killed process left half a line
    train(LineRecipe(), config(tmp_path), resume=str(tmp_path / "step_00000002"))
    steps = [row["step"] for row in metrics(tmp_path) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:2] == rows[:2]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_metrics_are_not_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples" / "grid_00000001.png").symlink_to(outside)
    tracker = Tracker(run)
    (run / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a link; nothing is written through it"):
        tracker.scalars(1, {"loss": 1.0})
    tracker.picture(1, "grid", Image.new("RGB", (2, 2)))
    tracker.finish()
    assert outside.read_text() == "mine\n" and Image.open(run / "samples" / "grid_00000001.png").size == (2, 2)


def test_a_run_without_a_terminal_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(LineRecipe(), config(run, steps=6, log_every=2)) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"training a tokenizer in {run}: steps 1 to 6 of 4 samples each, 37 parameters, cpu, float32"
    assert [line.split(":")[0] for line in said[1:-1]] == ["step 2/6", "step 4/6", "step 6/6"]
    assert "loss" in said[1] and "pictures/s" in said[1] and "left" in said[1] and "left" not in said[3]
    assert said[-1].startswith(f"saved {run / 'step_00000006'}; go on with: bitdance ")
    assert train(LineRecipe(), config(run, steps=6)) == 0
    assert "has its 6 steps already" in capsys.readouterr().err
    recipe = LineRecipe()
    recipe.feed.before[1] = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert train(recipe, config(tmp_path / "stopped", log_every=100)) == 130
    assert f"stopped by SIGINT: saved {tmp_path / 'stopped' / 'step_00000002'}; go on with the same" in capsys.readouterr().err
    assert train(LineRecipe(), config(tmp_path / "seldom", steps=9, log_every=100)) == 0
    assert "for the 6 steps to come" in capsys.readouterr().err  # how long, after the third step


class FullStream(io.StringIO):
    def write(self, text: str) -> int:
        raise no_space()


def test_what_cannot_be_said_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stream in (("full", FullStream()), ("none", None)):
        monkeypatch.setattr(sys, "stderr", stream)
        code = train(LineRecipe(), config(tmp_path / name, steps=1))
        monkeypatch.undo()
        assert code == 0


# a full disk


class Full:
    """The n-th of all calls that write fails, as a full disk would have it."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def patch(self, patch: pytest.MonkeyPatch, owner: Any, name: str, error: Callable[[], Exception]) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return original(*arguments, **options)
            self.calls += 1
            if self.calls == self.at:
                raise error()
            return original(*arguments, **options)

        patch.setattr(owner, name, call)


def no_space() -> Exception:
    return OSError(28, "No space left on device")


def no_space_for_rust() -> Exception:
    return weights.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def run_on_full_disk(run: Path, at: int, patch: pytest.MonkeyPatch) -> tuple[int, str | None]:
    """Calls that were made, and what the run said when call `at` failed."""
    full = Full(at)
    for name in ("open", "mkdir", "replace", "fsync"):
        full.patch(patch, os, name, no_space)
    full.patch(patch, weights, "save_file", no_space_for_rust)
    try:
        train(LineRecipe(), config(run, steps=4, save_every=2, sample_every=2, validate_every=2))
    except ValueError as error:
        return full.calls, str(error)
    return full.calls, None


def test_wherever_the_disk_is_full_there_is_one_message_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls, said = run_on_full_disk(tmp_path / "whole", 0, patch)
    assert said is None and calls > 30
    train(LineRecipe(), config(tmp_path / "first", steps=2))
    for at in range(1, calls + 1):
        run = tmp_path / f"run_{at}"
        with pytest.MonkeyPatch.context() as patch:
            _, said = run_on_full_disk(run, at, patch)
        if said is not None:
            assert "the disk is full" in said and "make room" in said and str(run) in said and ".incomplete" not in said, said
        found = [checkpoint.verify(folder) for folder in checkpoint.complete(run)]
        assert list(run.glob(".*incomplete*")) == [] and not (run / ".lock").exists()
        assert found in ([], [2], [2, 4]) and (said is not None or found == [2, 4])
        if at % 10 == 0:  # after making room it goes on to the same end
            assert train(LineRecipe(), config(run, steps=4, save_every=2)) == 0
            assert checkpoint.verify(checkpoint.step_folder(run, 4)) == 4


def test_a_first_checkpoint_too_large_for_the_disk_is_told_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=500))
    with pytest.raises(ValueError, match=r"step_00000001 needs \d+\.\d kB and the disk has 500 bytes free; make room first"):
        train(LineRecipe(), config(tmp_path, steps=1))


# nothing to the network


def ports(pid: int) -> list[str]:
    """Local addresses at which a process listens."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except OSError:
            continue
    listening = []
    for kind in ("tcp", "tcp6"):
        for entry in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            columns = entry.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                listening.append(columns[1])
    return listening


LOOK = "import sys, test_run_folder; test_run_folder.look_while_training(sys.argv[1])"


def look_while_training(folder: str) -> None:
    recipe, found = LineRecipe(), []
    recipe.feed.before[2] = lambda: found.append(ports(os.getpid()))
    train(recipe, config(Path(folder), zero_stage=2))
    with socket.socket() as one:  # what would be seen
        one.bind(("127.0.0.1", 0))
        one.listen()
        print(json.dumps([*found, len(ports(os.getpid()))]), flush=True)


@pytest.mark.skipif(not Path("/proc/self/net/tcp").is_file(), reason="this system does not say who listens where")
def test_a_run_of_one_process_opens_no_port(tmp_path: Path, ended: list[Any]) -> None:
    ended.append(process := child(LOOK, tmp_path))
    assert json.loads(line_of(process)) == [[], 1]
