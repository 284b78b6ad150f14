"""The training loop under every stage of ZeRO: two processes equal one, resuming is exact, processes and stage may change.

Two processes are started once and do all their runs; the runs of one process happen here.
"""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_engine import ROOT, Line, LineRecipe, assert_same, config, everything, metrics
from torch import Tensor, nn

from lfq_tokenizer import weights
from lfq_tokenizer.lock import FolderLock
from stages.config import DeepSpeedConfig, TrainingConfig
from stages.engine import checkpoint, processes
from stages.engine.loop import train
from stages.recipe import Discriminator, Losses

pytestmark = pytest.mark.slow

STAGES, MUON = (0, 1, 2, 3), "muon"
CHANGES = ((2, 2), (0, 3), (3, 1))  # stage of ZeRO before and after


class StoppingLine(Line):
    """Without noise, which would belong to a batch. In forward pass number `at` of its life it sends `signal` to its process."""

    def __init__(self, at: int = 0, number: int = signal.SIGTERM) -> None:
        super().__init__(noise=0.0)
        self.calls, self.at, self.signal = 0, at, number

    def forward(self, batch: Tensor, generator: torch.Generator, step: int) -> Losses:
        self.calls += self.training
        if self.training and self.calls == self.at:
            os.kill(os.getpid(), self.signal)
        return super().forward(batch, generator, step)


def recipe(at: int = 0, number: int = signal.SIGTERM, frozen: bool = False) -> LineRecipe:
    made = LineRecipe()
    made.module = StoppingLine(at, number)
    made.module.idle.requires_grad_(not frozen)
    return made


def work(folder: Path, rank: int) -> None:
    """All runs of two processes, with four samples in a step of both."""
    for name in (*STAGES, MUON):
        settings: dict[str, Any] = {"steps": 20, "batch_size": 1, "accumulation": 2, "log_every": 1}
        settings |= {"matrices": MUON} if name == MUON else {"zero_stage": name}
        assert train(recipe(frozen=True), config(folder / f"whole_{name}", **settings)) == 0
        # a signal between the halves of step 3, and to one process alone
        assert train(recipe(5 * rank, frozen=True), config(folder / f"parts_{name}", **settings, workers=2)) == 143
        assert train(recipe(frozen=True), config(folder / f"parts_{name}", **settings)) == 0
    for before, after in CHANGES:
        assert train(recipe(3), config(folder / f"two_{before}_{after}", before, batch_size=2)) == 143
        assert train(recipe(), config(folder / f"one_{before}_{after}", after, batch_size=2)) == 0
    refused(folder, rank)
    train(recipe(6, signal.SIGKILL), config(folder / "killed", 2, batch_size=2, save_every=2))


def refused(folder: Path, rank: int) -> None:
    """What both processes say when the disk of one is full, at every stage of ZeRO, and while another run has the folder."""
    said: dict[str, str] = {}
    for zero in STAGES:
        run, original, calls = folder / f"full_{zero}", weights.save_file, 0

        # of process 1 the second checkpoint's part; of process 0, which alone writes under ZeRO 0, its model
        fails, at = (1, 2) if zero else (0, 4)

        def full(*arguments: Any, original: Any = original, fails: int = fails, at: int = at, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at and rank == fails:
                raise weights.SafetensorError("I/O error: No space left on device (os error 28)")
            original(*arguments, **options)

        weights.save_file = full
        try:
            train(recipe(frozen=True), config(run, zero, save_every=2, batch_size=2))
        except ValueError as error:
            said[f"full_{zero}"] = str(error)
        finally:
            weights.save_file = original
    (folder / "taken").mkdir(exist_ok=True)
    held = FolderLock(folder / "taken") if rank == 1 else contextlib.nullcontext()
    with held:
        processes.barrier()
        try:
            train(recipe(frozen=True), config(folder / "taken", batch_size=2))
        except ValueError as error:
            said["taken"] = str(error)
    (folder / f"said_{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of all runs that two processes take part in."""
    folder, before = tmp_path_factory.mktemp("zero"), dict(os.environ)
    for first, after in CHANGES:
        assert train(recipe(3), config(folder / f"one_{first}_{after}", first)) == 143
    os.environ.clear()
    os.environ.update(before)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys, pathlib, test_engine_zero as t; t.work(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    started, outputs = [], []
    for rank in (0, 1):
        variables = before | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        outputs.append(folder / f"output_{rank}")
        with outputs[-1].open("w") as output:
            command = [sys.executable, "-c", code, str(folder), str(rank)]
            started.append(subprocess.Popen(command, env=variables, stdout=output, stderr=output))
    try:
        codes = [process.wait(280) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [-signal.SIGKILL] * 2, "\n".join(path.read_text()[-3000:] for path in outputs)
    yield folder


def test_what_one_process_fails_of_all_processes_say(runs: Path) -> None:
    said = [json.loads((runs / f"said_{rank}.json").read_text()) for rank in (0, 1)]
    for zero in STAGES:
        fails = 1 if zero else 0
        own, others = (said[rank][f"full_{zero}"] for rank in (fails, 1 - fails))
        assert "step_00000004" in own and "the disk is full" in own and others == f"process {fails}: {own}"
        assert [checkpoint.verify(folder) for folder in checkpoint.complete(runs / f"full_{zero}")] == [2]
        assert not list((runs / f"full_{zero}").glob(".*incomplete*"))
    assert "is in use by process" in said[0]["taken"] and said[1]["taken"] == f"process 0: {said[0]['taken']}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process without ZeRO, with all samples in one batch."""
    folder, before = tmp_path_factory.mktemp("alone"), dict(os.environ)
    train(recipe(frozen=True), config(folder / "twenty", steps=20))
    train(recipe(), config(folder / "six"))
    os.environ.clear()
    os.environ.update(before)
    return folder


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def assembled(folder: Path) -> dict[str, Tensor]:
    """KIND/PARAMETER → flattened, from the files of all processes."""
    found: dict[str, dict[int, Tensor]] = {}
    for path in sorted((folder / "resume").glob("learner_*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            places = json.loads(file.metadata()["places"])
            for key, (start, _) in places.items():
                found.setdefault(key, {})[start] = file.get_tensor(key)
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in found.items()}


def assert_close(first: Path, second: Path) -> None:
    a, b = assembled(first), assembled(second)
    assert a.keys() == b.keys() and any(key.startswith("average/") for key in a)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("zero", STAGES)
def test_two_processes_equal_one_with_all_samples_in_one_batch(runs: Path, alone: Path, zero: int) -> None:
    found, expected = losses(runs / f"whole_{zero}"), losses(alone / "twenty")
    assert len(found) == 20 and found == pytest.approx(expected, rel=1e-5)
    assert_close(checkpoint.step_folder(runs / f"whole_{zero}", 20), checkpoint.step_folder(alone / "twenty", 20))


@pytest.mark.parametrize("way", [*STAGES, MUON])
def test_two_processes_resume_exactly_with_any_number_of_loader_processes(runs: Path, way: int | str) -> None:
    whole, parts = (runs / f"{name}_{way}" for name in ("whole", "parts"))
    assert [checkpoint.verify(f) for f in checkpoint.complete(parts)] == [3, 20]
    assert_same(checkpoint.step_folder(whole, 20), checkpoint.step_folder(parts, 20))
    assert losses(whole) == losses(parts) and len(losses(parts)) == 20


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_the_number_of_processes_and_the_stage_may_change(runs: Path, alone: Path, before: int, after: int) -> None:
    expected = losses(alone / "six")
    train(recipe(), config(runs / f"two_{before}_{after}", after))  # two processes were, one goes on
    for name in ("one", "two"):
        run = runs / f"{name}_{before}_{after}"
        assert losses(run) == pytest.approx(expected, rel=1e-5) and len(expected) == 6
        assert_close(checkpoint.step_folder(run, 6), checkpoint.step_folder(alone / "six", 6))


def test_killed_processes_leave_a_checkpoint_that_goes_on(runs: Path, alone: Path) -> None:
    assert checkpoint.verify(checkpoint.last_saved(runs / "killed")) == 4
    assert train(recipe(), config(runs / "killed", 2)) == 0
    assert_close(checkpoint.step_folder(runs / "killed", 6), checkpoint.step_folder(alone / "six", 6))


# one process


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """DeepSpeed collects garbage many times while it builds its bfloat16 optimiser; what exists already need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collection")
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bfloat16_weights_learn_and_resume_exactly_in_float32(tmp_path: Path, zero: int) -> None:
    whole, parts = (config(tmp_path / name, zero, precision="bfloat16-weights", accumulation=2) for name in ("whole", "parts"))
    made = recipe()
    train(made, whole)
    assert train(recipe(6), parts) == 143 and train(recipe(), parts) == 0
    assert_same(*(checkpoint.step_folder(tmp_path / name, 6) for name in ("whole", "parts")))
    state = assembled(checkpoint.step_folder(tmp_path / "whole", 6))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert not torch.equal(state["weight/last.weight"], state["weight/last.weight"].bfloat16().float())
    assert losses(tmp_path / "whole")[-1] < 0.8 * losses(tmp_path / "whole")[0]
    assert made.module.last.weight.dtype == torch.bfloat16 and made.module.seen.dtype == torch.float32


def test_bfloat16_weights_want_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs deepspeed.zero_stage 1, 2 or 3"):
        train(recipe(), config(tmp_path, precision="bfloat16-weights"))


@pytest.mark.parametrize(
    "deepspeed",
    [
        DeepSpeedConfig(1, offload_optimizer=True),
        DeepSpeedConfig(2, offload_optimizer=True),
        DeepSpeedConfig(3, offload_optimizer=True, offload_parameters=True),
        DeepSpeedConfig(3, settings={"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 10}}),
    ],
)
def test_offload_and_settings_change_no_number(tmp_path: Path, alone: Path, deepspeed: DeepSpeedConfig) -> None:
    settings = dataclasses.replace(config(tmp_path), deepspeed=deepspeed)
    assert train(recipe(3), settings) == 143 and train(recipe(), settings) == 0
    assert losses(tmp_path) == pytest.approx(losses(alone / "six"), rel=1e-5)
    assert_close(checkpoint.step_folder(tmp_path, 6), checkpoint.step_folder(alone / "six", 6))


def with_scale(settings: TrainingConfig, **scale: float) -> TrainingConfig:
    return dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, scale=scale))


@pytest.mark.parametrize("zero", STAGES)
def test_parts_learn_at_their_own_rate(tmp_path: Path, zero: int) -> None:
    train(recipe(), with_scale(config(tmp_path, zero, steps=1), last=0.25))
    state, start = assembled(checkpoint.step_folder(tmp_path, 1)), dict(Line().named_parameters())
    # the first step of Adam moves by its rate wherever there is a gradient; weight decay is proportional to the rate
    for part, rate in (("first", 0.05), ("last", 0.0125)):
        weight = start[f"{part}.weight"].detach().flatten()
        moved = (state[f"weight/{part}.weight"] - weight * (1 - 0.01 * rate)).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)
    (row,) = [row for row in metrics(tmp_path) if "loss" in row]
    assert (row["lr"], row["lr/last"]) == (0.05, 0.0125) and "lr/first" not in row


def test_an_unknown_part_is_refused_with_a_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer.scale names \['haed'\]; parts of this model are first, last"):
        train(recipe(), with_scale(config(tmp_path), haed=0.1))


@pytest.mark.parametrize("zero", STAGES)
def test_frozen_parts_stay_and_are_saved(tmp_path: Path, zero: int) -> None:
    made = recipe()
    made.module.first.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    train(made, config(tmp_path, zero, steps=2))
    folder = checkpoint.step_folder(tmp_path, 2)
    state, given = assembled(folder), everything(folder)
    for name in ("first.weight", "first.bias"):
        assert torch.equal(state[f"frozen/{name}"], start[name].flatten()) and f"average/{name}" not in state
        assert torch.equal(given[f"model/line.safetensors/{name}"], start[name])
    assert not torch.equal(state["weight/last.weight"], start["last.weight"].flatten())
    with pytest.raises(ValueError, match=r"does not fit its config: missing weight/first.weight"):
        train(recipe(), config(tmp_path, zero))  # nothing is frozen any more


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    made = recipe()
    made.module.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing trains: all parts \(first, last\) are frozen"):
        train(made, config(tmp_path))


def test_a_discriminator_is_refused_under_zero_3(tmp_path: Path) -> None:
    made: Any = recipe()
    made.discriminator = Discriminator(Line(), config(tmp_path).optimizer, 0)
    with pytest.raises(ValueError, match="deepspeed.zero_stage = 3 does not train a discriminator; use 0, 1 or 2"):
        train(made, config(tmp_path, 3))


def test_a_checkpoint_of_an_earlier_version_is_refused_with_the_way_on(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, lambda folder: (folder / "ema.safetensors").touch(), 1)
    with pytest.raises(ValueError, match="saved by an earlier version.* start again with --resume no, from its model/"):
        train(recipe(), config(tmp_path))


def test_another_model_is_named_on_resume(tmp_path: Path) -> None:
    train(recipe(), config(tmp_path, steps=1))
    made: Any = recipe()
    made.module.last = nn.Linear(5, 2)
    with pytest.raises(ValueError, match=r"missing weight/last.bias \[2\]"):
        train(made, config(tmp_path))


def test_a_lost_part_of_a_parameter_is_named(runs: Path, tmp_path: Path) -> None:
    def write(target: Path) -> None:
        without = shutil.ignore_patterns("learner_00001.safetensors", "manifest.json")
        shutil.copytree(runs / "parts_3" / "step_00000003", target, ignore=without, dirs_exist_ok=True)

    checkpoint.save(tmp_path, 3, write, 1)
    with pytest.raises(ValueError, match=r"lacks a process's part of weight/first.weight; resume from an older step"):
        train(recipe(frozen=True), config(tmp_path))
