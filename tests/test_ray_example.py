"""examples/ray_generate.py: the files of `bitdance generate`, whoever makes them; stopped and resumed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.jobs.job import JobDefaults, Jobs, requests_from_arguments

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_generate.py"
MODEL = str(Path(__file__).parent / "golden" / "t2i_ckpt")
SMALL = ["--height", "32", "--width", "32", "--steps", "2", "--guidance", "2", "--model", MODEL, "--batch-size", "2"]
PROMPTS = ["a cat", "a dog that is a good deal longer", "", "ein Häuschen", "x", "two red balls"]
HAS_RAY = importlib.util.find_spec("ray") is not None and importlib.util.find_spec("pyarrow") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'ray[data]'")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_generate", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["generate", *PROMPTS, "--seed", "1", "2", *SMALL, "--device", "cpu", "-o", str(folder)]) == 0
    return pictures(folder)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def arguments(folder: Path, *more: str) -> list[str]:
    return [*PROMPTS, "--seed", "1", "2", *SMALL, "-o", str(folder), "--gpus-per-worker", "0", *more]


def ray_generate(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parent.parent)}
    command = [sys.executable, str(EXAMPLE), *arguments(folder, *more)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_workers_make_the_files_of_one_process(example: ModuleType, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Without Ray: the class that it runs, called as it calls it."""
    options, order = example.read(arguments(tmp_path, "--workers", "2"))
    workers = [example.Painter(order), example.Painter(order)]
    blocks = example.blocks(order.jobs, order.batch_size, options.workers)
    assert [len(block) for block in blocks] == [6, 6]
    for worker, block in zip(workers, blocks, strict=True):
        rows = worker({"data": np.array([job.index for job in block])})
        assert rows["data"].tolist() == [job.index for job in block] and set(rows["error"]) == {""}
    assert pictures(tmp_path) == whole
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    workers[1]({"data": np.array([job.index for job in blocks[0]])})  # a block that is handed out again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")} == before


def test_a_failure_is_a_row(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BitDancePipeline.generate

    def call(self: BitDancePipeline, prompts: list[str], *options: Any) -> Any:
        if "x" in prompts:
            raise RuntimeError("no luck")
        return original(self, prompts, *options)

    monkeypatch.setattr(BitDancePipeline, "generate", call)
    _, order = example.read(arguments(tmp_path))
    rows = example.Painter(order)({"data": np.array([job.index for job in order.jobs])})
    assert [order.jobs[i].prompt for i, e in zip(rows["data"], rows["error"]) if e] == ["x", "x"]
    assert set(rows["error"]) == {"", "RuntimeError: no luck"} and len(pictures(tmp_path)) == 10


def test_every_worker_gets_something_and_no_block_is_long(example: ModuleType) -> None:
    jobs = list(Jobs(requests_from_arguments(["p"]), JobDefaults(64, 64, 2, 1.0, n=1000)))
    assert [len(block) for block in example.blocks(jobs[:16], 8, 8)] == [2] * 8
    assert max(len(block) for block in example.blocks(jobs, 8, 8)) == 32


def test_planning_needs_no_gpu_and_gives_the_same_hashes(example: ModuleType, tmp_path: Path) -> None:
    _, cpu = example.read(arguments(tmp_path))
    _, gpu = example.read([*arguments(tmp_path), "--gpus-per-worker", "1", "--dtype", "float32"])
    assert (cpu.device, gpu.device) == ("cpu", "cuda")
    assert [cpu.hash(job) for job in cpu.jobs] == [gpu.hash(job) for job in gpu.jobs]
    assert example.read([*arguments(tmp_path), "--gpus-per-worker", "1"])[1].dtype == "bfloat16"
    with pytest.raises(ValueError, match="--device is left to Ray"):
        example.read([*arguments(tmp_path), "--device", "cpu"])


@needs_ray
def test_ray_gives_the_files_of_one_process(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run = ray_generate(tmp_path, "--workers", "2")
    shown, _ = run.communicate(timeout=280)
    assert run.returncode == 0, shown
    assert "12 pictures in" in shown and "(12 made, 0 there before)" in shown
    assert pictures(tmp_path) == whole


@needs_ray
@pytest.mark.timeout(600)
def test_ray_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    steps = ["--steps", "300"]  # slow enough to be stopped half way
    stopped = ray_generate(tmp_path / "ray", "--workers", "2", *steps)
    manifest = tmp_path / "ray" / "manifest.jsonl"
    end = time.monotonic() + 200
    while not manifest.exists() and time.monotonic() < end:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    shown, _ = stopped.communicate(timeout=100)
    assert stopped.returncode == 143, shown
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").glob("*.png")}
    assert 0 < len(before) < 12
    again = ray_generate(tmp_path / "ray", "--workers", "1", *steps)
    shown, _ = again.communicate(timeout=280)
    assert again.returncode == 0 and f"{len(before)} there before" in shown, shown
    assert {path: path.stat().st_mtime_ns for path in before} == before
    prompts = [*PROMPTS, "--seed", "1", "2", *SMALL, *steps, "--device", "cpu"]
    assert main(["generate", *prompts, "-o", str(tmp_path / "one")]) == 0
    assert pictures(tmp_path / "ray") == pictures(tmp_path / "one")
    files = [json.loads(line)["file"] for line in manifest.read_text().splitlines()]
    assert set(files) == set(pictures(tmp_path / "one"))
