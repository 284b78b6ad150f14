"""Pre-training, continued training, fine-tuning on two processes, then export and pictures: the whole way, chained."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from test_debug_run import draw, rows

import stages.cli
from bitdance.cli import main as bitdance
from lfq_tokenizer.weights import read_safetensors
from stages.data.cli import main as data
from stages.engine.checkpoint import complete, newest, verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DEBUG = ROOT / "configs" / "debug"
STAGES = ("pretrain", "continue", "finetune")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LIMIT = 600  # CPU seconds for all three stages, export and generation: five minutes on two cores


def settings(place: Path, stage: str, out: Path) -> list[str]:
    """Pictures alone at first; later two sources, one of them with ready-made bits."""
    pictures, bits = (json.dumps([str(place / name)]) for name in ("shards", "bits"))
    changes = [f"run.out={out}", f"data.heldout={pictures}"]
    if stage == "pretrain":
        changes += [f"data.train={pictures}", f"generator.tokenizer={place / 'tokenizer'}"]
    else:
        before = STAGES[STAGES.index(stage) - 1]
        changes += [f"data.sources=[{{places={pictures}, weight=1}}, {{places={bits}, weight=2}}]", "data.train=[]"]
        changes += [f"generator.tokenizer={place / 'tokenizer'}", f"generator.init={place / before}"]
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stages")
    draw(place / "drawings")
    assert data(["pack", "folder", str(place / "shards"), str(place / "drawings"), "--size", "16"]) == 0
    tokenizer = [f"run.out={place / 'tokenizer'}", f"data.train={json.dumps([str(place / 'shards')])}", "run.steps=2"]
    assert stages.cli.train([str(DEBUG / "tokenizer.toml"), *(part for s in tokenizer for part in ("--set", s))]) == 0
    assert stages.cli.tokenizer(["encode", str(place / "shards"), str(place / "bits"), "--model", str(place / "tokenizer")]) == 0
    return place


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, Any]:
    """The three stages, two processes each, an export and two pictures; the CPU seconds that this took."""
    started = _cpu_seconds()
    for stage in STAGES:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stages"]
        command = [*launcher, str(DEBUG / f"{stage}.toml"), *settings(place, stage, place / stage)]
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert stages.cli.export([str(place / "finetune"), str(place / "model")]) == 0
    pictures = ["generate", "a red circle", "--model", str(place / "model"), "--steps", "2", "--device", "cpu", "-o"]
    for side in ("8", "16"):
        assert bitdance([*pictures, str(place / f"out{side}"), "--height", side, "--width", side]) == 0
    return {"seconds": _cpu_seconds() - started}


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for: what was computed, however busy the machine is."""
    return sum(os.times()[:4])


def test_all_three_stages_export_and_pictures_take_less_than_five_minutes(trained: dict[str, Any]) -> None:
    assert trained["seconds"] < LIMIT


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_a_whole_checkpoint_and_says_what_it_did(place: Path, trained: Any, stage: str) -> None:
    run = place / stage
    assert verify(newest(run)) == 4
    steps = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    watched = {"vision", "text", "bit_accuracy", "grad_norm", "images_per_s", "tokens_per_s", "packing", "data_wait", "skipped"}
    assert all(watched <= row.keys() for row in steps)
    assert steps[-1]["packing"] >= 0.9 and steps[-1]["skipped"] == 0
    judged = [row for row in rows(run) if "heldout/vision" in row]
    assert [row["step"] for row in judged] == [2, 4]
    assert {"heldout/text", "heldout/bit_accuracy", "heldout/vision/8", "heldout/vision/16"} <= judged[-1].keys()
    assert (run / "samples" / "grid_00000004.png").is_file()


@pytest.mark.parametrize("stage", STAGES)  # of which each trains under another stage of ZeRO
def test_raw_weights_are_put_together_from_both_processes(place: Path, trained: Any, stage: str, tmp_path: Path) -> None:
    assert stages.cli.export([str(place / stage), str(tmp_path / "raw"), "--weights", "raw"]) == 0
    step = newest(place / stage)
    numbers: dict[str, torch.Tensor] = {}
    for rank in range(2):
        with safe_open(str(step / "resume" / f"learner_{rank:05d}.safetensors"), framework="pt") as file:
            for key, (start, size) in json.loads(file.metadata()["places"]).items():
                part = file.get_tensor(key)
                whole = numbers.setdefault(key, torch.full((size,), float("nan")))
                whole[start : start + len(part)] = part
    names = {"model": "backbone.lm.", "projector": "projector.", "vision_head": "head."}
    for file_name, prefix in names.items():
        raw, averaged = (read_safetensors(where / f"{file_name}.safetensors") for where in (tmp_path / "raw", step / "model"))
        assert all(torch.equal(t.flatten(), numbers[f"weight/model.{prefix}{name}"]) for name, t in raw.items())
        assert raw.keys() == averaged.keys() and not any(torch.equal(raw[name], averaged[name]) for name in raw)


def test_a_stage_goes_on_from_the_averaged_weights_of_the_one_before(place: Path, trained: Any) -> None:
    """After a step of size zero the model of a stage is the model that the stage before left."""
    out = place / "still"
    changes = [*settings(place, "continue", out), "--set", "run.steps=1", "--set", "optimizer.lr=0.0"]
    assert stages.cli.train([str(DEBUG / "continue.toml"), *changes]) == 0
    before, after = newest(place / "pretrain") / "model", newest(out) / "model"
    for name in ("model", "projector", "vision_head", "ae"):
        one, other = (read_safetensors(folder / f"{name}.safetensors") for folder in (before, after))
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_the_exported_model_draws_every_resolution_of_the_mix_and_remembers_its_stages(place: Path, trained: Any) -> None:
    for side in (8, 16):
        (picture,) = (place / f"out{side}").glob("*.png")
        assert Image.open(picture).size == (side, side)
    extras = json.loads((place / "model" / "bitdance.json").read_text())
    assert extras["sizes"] == [[8, 8], [16, 16]]
    assert [stage["name"] for stage in extras["card"]["stages"]] == list(STAGES)
    assert str(place) not in json.dumps(extras)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generator.head.parallel_num=16", "patch"),
        ("generator.head.ch_latent=256", "ch_latent"),
        ("generator.backbone.hidden_size=32", "hidden_size"),
        ("generator.tokenizer=demo", "tokenizer"),
    ],
)
def test_a_stage_that_does_not_fit_the_one_before_is_refused(
    place: Path, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    changes = [*settings(place, "finetune", tmp_path / "run"), "--set", change]
    assert stages.cli.train([str(DEBUG / "finetune.toml"), *changes]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists() or not complete(tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_a_stage_changes_nothing(place: Path, trained: Any, tmp_path: Path, stage: str, workers: int) -> None:
    """Weights, average, optimiser and figures after 4 steps equal those after 2 and 2 more; two micro-steps each."""
    for run, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        changes = [*settings(place, stage, tmp_path / run)]
        for change in (f"run.steps={steps}", f"run.workers={workers}", "run.accumulation=2", "run.sample_every=100"):
            changes += ["--set", change]
        assert stages.cli.train([str(DEBUG / f"{stage}.toml"), *changes]) == 0
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert (whole / "resume" / "learner_00000.safetensors").is_file()
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors")):
        one, other = (read_safetensors(folder / path) for folder in (whole, parts))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), path
    for name in ("loss", "vision", "text", "grad_norm"):
        one, other = ([row[name] for row in rows(tmp_path / run) if "loss" in row] for run in ("whole", "parts"))
        assert one == other and len(one) == 4
