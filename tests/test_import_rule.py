"""lfq_tokenizer ← bitdance ← stages ← distill: nothing imports to the right, no circle anywhere, and the start stays quick."""

import ast
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ORDER = ["lfq_tokenizer", "bitdance", "bitdance_diffusers", "comfyui_bitdance", "stages", "distill"]
PRESENT = [name for name in ORDER if (ROOT / name).is_dir()]
# The rooms of bitdance, from the ground up: a file imports files of its own room and of rooms before it.
ROOMS: list[tuple[str, ...]] = [
    ("values",),
    ("foreign", "tokenizer_file"),
    ("heads",),
    ("sequence",),
    ("networks",),
    ("model",),
    ("folder",),
    ("loop", "picture", "coding", "generate", "pipeline", "picture_pipeline"),
    ("costs",),
    ("verify",),
    ("jobs",),
    ("bench",),
    ("generator",),  # the registry, which names kinds as strings
    ("kinds",),
    ("serve",),
    ("cli", "__main__"),
]
# The same of stages: data and the engine know no recipe, a recipe knows no command.
ROOMS_OF_STAGES = [
    ("command", "schema"),
    ("data",),
    ("tables", "config", "feed", "recipe"),
    ("engine",),
    ("recipes", "plan", "measure", "evaluate", "raw_weights", "export"),
    ("cli", "__main__"),
]
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


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name → file of every module of ours."""
    found = {}
    for path in (path for package in ORDER for path in sorted((root / package).rglob("*.py"))):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(source: str, known: Collection[str]) -> set[str]:
    """The modules of `known` that a source imports, at its top or inside a function, but for types alone (`if TYPE_CHECKING`)."""
    tree = ast.parse(source)
    only_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in inside}
    return names & set(known)


def circles(graph: Mapping[str, Collection[str]]) -> list[set[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            start = stack.index(node)
            if len(stack) - start > 1:
                found.append(set(stack[start:]))
            del stack[start:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: arrows(path.read_text(encoding="utf-8"), known) - {name} for name, path in known.items()}


def test_no_circle_of_imports(graph: dict[str, set[str]]) -> None:
    """Imports inside functions count: they only hide a circle."""
    assert [sorted(circle) for circle in circles(graph)] == []


def test_circles_are_seen() -> None:
    assert circles({"a": "b", "b": "c", "c": "a", "d": "a"}) == [{"a", "b", "c"}]
    assert circles({"a": "bc", "b": "c", "c": ""}) == []
    source = """
import p.a
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from p.types import T
def f():
    from p import late, thing
"""
    assert arrows(source, {"p", "p.a", "p.types", "p.late"}) == {"p.a", "p.late", "p"}


def room(name: str, rooms: Sequence[Collection[str]]) -> int:
    """Which of these rooms a module belongs to."""
    return next(i for i, names in enumerate(rooms) if name.split(".")[1] in names)


@pytest.mark.parametrize(("package", "rooms"), [("bitdance", ROOMS), ("stages", ROOMS_OF_STAGES)])
def test_inner_rooms_know_nothing_of_outer_ones(
    graph: dict[str, set[str]], package: str, rooms: Sequence[Collection[str]]
) -> None:
    inside = {name: targets for name, targets in graph.items() if name.startswith(f"{package}.")}
    assert [
        f"{name} imports {target}"
        for name, targets in inside.items()
        for target in sorted(targets)
        if target.startswith(f"{package}.") and room(target, rooms) > room(name, rooms)
    ] == []


def test_shared_rooms_name_no_kind() -> None:
    """Beside a kind's own folder only the registry names it, and the two files that define the text model; nothing asks whether a
    kind is this or that, nor of which class a pipeline is."""
    kinds = {path.name for path in (ROOT / "bitdance" / "kinds").iterdir() if (path / "__init__.py").is_file()}
    naming, asking = set(), []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and not name.startswith("bitdance.kinds."):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                if any(re.search(r"\bkind\b", side) for side in sides) and any(kind in side for kind in kinds for side in sides):
                    asking.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and kinds & set(node.value.split(".")):
                naming.add(name)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and "Pipeline" in ast.unparse(node.args[1]):
                asking.append(f"{name}:{node.lineno}")
    shared = {name for name in naming if name.startswith("bitdance.") and not name.startswith("bitdance.kinds.")}
    assert shared == {"bitdance.generator", "bitdance.folder.config", "bitdance.pipeline"}
    assert asking == []


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


@pytest.mark.parametrize("command", ["generate", "info", "sizes", "doctor", "verify", "bench", "convert", "serve"])
def test_help_of_a_command_loads_no_torch(command: str) -> None:
    code = f"import sys\nfrom bitdance.cli import main\nmain(['{command}', '--help'])\nprint('torch' in sys.modules)"
    assert python("-c", code).stdout.endswith("False\n")
