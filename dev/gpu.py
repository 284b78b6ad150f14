"""All that needs a GPU, in at most 25 minutes, into one JSON:

    python dev/gpu.py [out/gpu.json]                  or: make gpu

The tests marked `gpu`, then dev/gpu_bench.sh: the speed of the 14B shape, with random weights. Neither needs the packages of
training. The JSON holds every figure with its target and whether it is met, the versions, the device, the date, the command,
and the reason of whatever failed or was skipped. What was measured before a part fails, or runs out of time, stays.

Exit code 0: everything ran, and no target is missed. 1: a part or a test failed, or a target is missed. 2: there is no GPU.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS_SECONDS, BENCH_SECONDS = 300, 1150  # with start and end, under 25 minutes
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "flash-attn-4", "torchao", "bitsandbytes", "deepspeed")
SHOWN = 15  # lines of a part that failed


@dataclass(frozen=True)
class Figure:
    """`target` as a text, "≤ 4.5"; `met` is None where there is no target for this device, or no value."""

    name: str
    value: float | None
    unit: str
    target: str | None
    met: bool | None


@dataclass(frozen=True)
class Part:
    """One command: how it ended, and the end of what it printed where it failed."""

    name: str
    command: str
    seconds: float
    ok: bool
    reason: str = ""


def figure(name: str, value: float | None, unit: str, target: str | None = None) -> Figure:
    """`target`: "≤ NUMBER" or "≥ NUMBER"."""
    if value is None or target is None:
        return Figure(name, value, unit, target, None)
    sign, bound = target.split()
    return Figure(name, value, unit, target, value <= float(bound) if sign == "≤" else value >= float(bound))


def figures(studies: Mapping[str, Any], device: str, predicted: float | None) -> list[Figure]:
    """What `studies` say, the JSON objects of dev/gpu_bench.sh by part; `predicted`: bytes that doctor computes for a picture.

    A part that is not there leaves its figures without a value.
    """

    def run(part: str, preset: str, batch: int) -> dict[str, Any]:
        runs = studies.get(part, {}).get("runs", [])
        return next((run for run in runs if run["preset"] == preset and run["batch"] == batch), {})

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above and below else None

    quick, instant = (run("batch-1", preset, 1) for preset in ("quick", "instant"))
    own, balanced, sixteen = run("batch-1", "own", 1), run("batch-1", "balanced", 1), run("batch-16", "balanced", 16)
    stick, eager = run("yardstick", "own", 1), run("eager", "own", 1)
    floor = own.get("phases", {}).get("total", {}).get("floor_seconds")
    memory = ratio(own.get("peak_memory_bytes"), predicted)
    peak = studies.get("batch-1", {}).get("peaks", {}).get("bfloat16", {})
    h200 = "≤ 4.5" if "H200" in device else None
    return [
        figure("a picture of 1024×1024, 50 steps, bfloat16, batch 1", own.get("seconds"), "s", h200),
        figure("the same, share of the floor reached", ratio(floor, own.get("seconds")), "", "≥ 0.7"),
        figure("the same, memory at its peak to what doctor predicts", memory, "", "≤ 1.1"),
        figure("the same, times faster than the published procedure", stick.get("yardstick", {}).get("times_faster"), "×", "≥ 1"),
        figure("the same, bits equal to the published procedure's", stick.get("yardstick", {}).get("equal_bits"), ""),
        figure("compiled with graphs, times faster than without", ratio(eager.get("seconds"), own.get("seconds")), "×", "≥ 1"),
        figure("preset quick (two evaluations, guidance folded in), batch 1", quick.get("seconds"), "s"),
        figure("preset instant, batch 1", instant.get("seconds"), "s"),
        *(
            figure(f"preset quick, batch {batch}", run("batch-16", "quick", batch).get("images_per_s"), "pictures/s")
            for batch in (2, 4, 16)
        ),
        figure("preset balanced, batch 1", balanced.get("images_per_s"), "pictures/s"),
        figure("preset balanced, batch 16", sixteen.get("images_per_s"), "pictures/s"),
        figure(
            "int8, batch 1, times faster than bfloat16",
            ratio(run("int8", "balanced", 1).get("images_per_s"), balanced.get("images_per_s")),
            "×",
            "≥ 1",
        ),
        figure(
            "int8, batch 16, to bfloat16",
            ratio(run("int8", "balanced", 16).get("images_per_s"), sixteen.get("images_per_s")),
            "×",
        ),
        figure("a large matrix product, bfloat16", peak.get("flops_per_s"), "FLOP/s"),
        figure("a large copy, read and written", peak.get("bytes_per_s"), "bytes/s"),
    ]


def run_part(name: str, command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None) -> Part:
    """Run it in a process group of its own, which ends with it. Whatever goes wrong is the part's reason."""
    begun, ended = time.monotonic(), "could not start"
    try:
        with log.open("wb") as out:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                code = child.wait(timeout=seconds)
                ended = "" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds:.0f} s"
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        reason = "\n".join([ended, *lines[-SHOWN:]]) if ended else ""
    except OSError as error:
        reason = f"{ended}: {error}"
    return Part(name, " ".join(command), time.monotonic() - begun, not reason, reason)


def test_results(report: Path) -> dict[str, Any]:
    """Of pytest's JUnit file: how many passed, and of every other test, and file that cannot be read, the reason."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}
    if not report.is_file():
        return found | {"failed": [{"test": "all of them", "reason": "pytest wrote no report"}]}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        ends = {child.tag: (child.get("message") or child.text or "").strip() for child in case}
        if bad := ends.keys() & {"failure", "error"}:
            found["failed"].append({"test": name, "reason": ends[bad.pop()]})
        elif "skipped" in ends:
            found["skipped"].append({"test": name, "reason": ends["skipped"]})
        else:
            found["passed"] += 1
    return found


def run_tests(folder: Path, environment: Mapping[str, str], tests: Path = ROOT / "tests") -> tuple[Part, dict[str, Any]]:
    """The tests marked `gpu`. A file that cannot be imported here, for want of a package, is a reason, and stops no other."""
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    part = run_part("tests", [*pytest, f"--junitxml={report}", *files], TESTS_SECONDS, folder / "tests.txt", environment)
    return part, test_results(report)


def read_studies(folder: Path) -> dict[str, Any]:
    """The JSON objects that the bench wrote, by part; one that is broken is as good as absent."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
    return found


def no_gpu() -> str:
    """Why nothing can be measured here, or nothing."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed for {sys.executable}"
    return "" if torch.cuda.is_available() else f"there is no CUDA device here (torch {torch.__version__})"


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def described() -> dict[str, Any]:
    """Device and versions."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    versions = {name: version(name) for name in PACKAGES}
    return {
        "device": {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "driver": driver(),
        },
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
    }


def driver() -> str | None:
    """None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def predicted_bytes() -> float | None:
    """What doctor computes for a picture of the published shape in bfloat16, without the program itself."""
    sys.path.insert(0, str(ROOT))
    from bitdance.costs.memory import BatchSpec, needs
    from bitdance.costs.shapes import SHAPES

    found = needs(SHAPES["14b-64x"], BatchSpec(1024, 1024, device="cuda"))
    return float(found.peak - found.phases[found.phase].get("program", 0))


def main(argv: Sequence[str]) -> int:
    out = Path(argv[0] if argv else "out/gpu.json").absolute()
    if absent := no_gpu():
        where = "run `make gpu` on a machine with an NVIDIA GPU of 80 GB or more, and torch built for it"
        print(f"{absent}, so nothing was run and {out.name} was not written; {where}", file=sys.stderr)
        return 2
    begun, folder = time.monotonic(), out.with_name(f"{out.stem}-parts")
    folder.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "dev/gpu.py", *argv]),
        **described(),
    }
    tests, results = run_tests(folder, environment)
    write(out, found | {"tests": results, "parts": [asdict(tests)], "complete": False})
    for old in folder.glob("*.json"):  # of an earlier run
        old.unlink()
    bench = run_part("bench", ["bash", "dev/gpu_bench.sh", str(folder)], BENCH_SECONDS, folder / "bench.txt", environment)
    try:
        predicted = predicted_bytes()
    except Exception as error:
        predicted = None
        found["predicted_memory"] = f"not computed: {error!r}"
    measured = figures(read_studies(folder), found["device"]["name"], predicted)
    failed = [{"part": part.name, "reason": part.reason} for part in (tests, bench) if not part.ok]
    missed = [entry.name for entry in measured if entry.met is False]
    found |= {
        "seconds": time.monotonic() - begun,
        "figures": [asdict(entry) for entry in measured],
        "missed": missed,
        "tests": results,
        "parts": [asdict(tests), asdict(bench)],
        "failed": failed,
        "complete": True,
    }
    write(out, found)
    for entry in measured:
        value = "not measured" if entry.value is None else f"{entry.value:.4g} {entry.unit}".strip()
        verdict = {True: "met", False: "MISSED", None: ""}[entry.met]
        print(f"{entry.name}: {value}" + (f" (target {entry.target}{', ' if verdict else ''}{verdict})" if entry.target else ""))
    print(f"tests: {results['passed']} passed, {len(results['failed'])} failed, {len(results['skipped'])} skipped")
    for entry in failed:
        print(f"{entry['part']} failed: {entry['reason']}")
    print(out)
    return int(bool(failed or missed or results["failed"]))


def write(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
