"""lfq_tokenizer ← bitdance ← stages ← distill: nothing imports to the right, and the start stays quick."""

import ast
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ORDER = ["lfq_tokenizer", "bitdance", "bitdance_diffusers", "stages", "distill"]
PRESENT = [name for name in ORDER if (ROOT / name).is_dir()]
HEAVY = ("deepspeed", "webdataset", "flash_attn", "liger_kernel", "gradio")
# On a busy or slow machine the same code takes longer; CI may say by how much.


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import in a file, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.split(".")[0]


def offenders(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, name in imported(path)
        if name in forbidden
    ]


def test_the_rooms_are_there() -> None:
    assert PRESENT[:2] == ORDER[:2]
    assert all(any((ROOT / name).rglob("*.py")) for name in PRESENT)


@pytest.mark.parametrize("package", PRESENT)
def test_arrows_only_point_left(package: str) -> None:
    assert offenders(package, set(ORDER[ORDER.index(package) + 1 :]) | {"tests", "configs"}) == []


def test_the_rule_sees_an_import_upward(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from stages.engine import g\n    import_module('distill.x')\n    import deepspeed.a as b\n")
    assert sorted(imported(file)) == [(2, "stages"), (3, "distill"), (4, "deepspeed")]


def test_the_tokenizer_stands_alone() -> None:
    allowed = {"torch", "safetensors", "numpy", "PIL", "lfq_tokenizer"} | set(sys.stdlib_module_names)
    found = {name for path in (ROOT / "lfq_tokenizer").rglob("*.py") for _, name in imported(path)}
    assert found <= allowed, found - allowed


def test_the_library_imports_no_training_package() -> None:
    assert offenders("bitdance", {"deepspeed", "webdataset", "tensorboard", "gradio"}) == []
    assert offenders("lfq_tokenizer", {"deepspeed", "webdataset", "tensorboard", "gradio", "transformers"}) == []


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=True)


def cpu_seconds(*arguments: str) -> float:
    """What a run of Python computes, however busy the machine is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_bitdance_is_quick_and_light() -> None:
    loaded = json.loads(python("-c", "import bitdance, sys, json; print(json.dumps(sorted(sys.modules)))").stdout)
    assert "bitdance" in loaded
    assert not set(HEAVY) & {name.split(".")[0] for name in loaded}
    assert cpu_seconds("-c", "import bitdance") < 1.0  # measured 0.05


def test_using_the_pipeline_class_loads_no_training_package() -> None:
    code = "import bitdance, sys, json; bitdance.BitDancePipeline; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(python("-c", code).stdout)
    assert "torch" in loaded
    assert not set(HEAVY) & {name.split(".")[0] for name in loaded}


def test_help_is_quick_and_loads_no_torch() -> None:
    shown = python("-m", "bitdance", "--help").stdout
    assert all(command in shown for command in ("generate", "info", "sizes", "doctor"))
    code = "import sys\nfrom bitdance.cli import main\nmain(['--help'])\nprint('torch' in sys.modules)"
    assert python("-c", code).stdout.endswith("False\n")
    assert cpu_seconds("-m", "bitdance", "--help") < 0.5  # measured 0.13


@pytest.mark.parametrize("command", ["generate", "info", "sizes", "doctor", "verify", "bench"])
def test_help_of_a_command_loads_no_torch(command: str) -> None:
    code = f"import sys\nfrom bitdance.cli import main\nmain(['{command}', '--help'])\nprint('torch' in sys.modules)"
    assert python("-c", code).stdout.endswith("False\n")
