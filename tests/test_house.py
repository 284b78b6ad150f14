"""The rules of the house that a machine can check."""

import ast
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVERY = ("lfq_tokenizer", "bitdance", "bitdance_diffusers", "comfyui_bitdance", "stages", "distill")
PACKAGES = [name for name in EVERY if (ROOT / name).is_dir()]
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_texts() -> list[Path]:
    """Text files of the repository (of the packages only, in an unpacked archive without git)."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = SOURCES
    kinds = {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".txt", ".sh", ".cfg", ""}
    recorded = ROOT / "tests" / "golden"
    return [p for p in paths if p.suffix in kinds and p.is_file() and recorded not in p.parents and p.stat().st_size < 2**20]


def test_files_are_short() -> None:
    lengths = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert statistics.median(lengths.values()) <= 150


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "misc", "common", "helpers", "helper"}
    assert [shown(path) for path in SOURCES if drawers & {path.stem, *path.relative_to(ROOT).parts}] == []


def unpickling_calls(source: str) -> list[int]:
    """Lines that call `torch.load` without `weights_only=True`, or load a pickle directly."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        safe = any(
            keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            for keyword in node.keywords
        )
        if (owner == "torch" and node.func.attr == "load" and not safe) or (
            owner in ("pickle", "cPickle", "dill") and node.func.attr in ("load", "loads", "Unpickler")
        ):
            found.append(node.lineno)
    return found


def test_nothing_is_un_pickled() -> None:
    assert [f"{shown(p)}:{n}" for p in SOURCES for n in unpickling_calls(p.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.load(f)", [1]),
        ("torch.load(f, weights_only=False)", [1]),
        ("torch.load(f, weights_only=flag)", [1]),
        ("\npickle.loads(b)", [2]),
        ("torch.load(f, weights_only=True)\njson.load(f)", []),
    ],
)
def test_the_pickle_rule_sees_what_it_should(source: str, lines: list[int]) -> None:
    assert unpickling_calls(source) == lines


def test_no_registry_host_is_written_down() -> None:
    hosts = [
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("registry.npm", "js.org"),
        ("npm", "js.com"),
        ("download.py", "torch.org"),
    ]
    pattern = re.compile("|".join(re.escape("".join(parts)) for parts in hosts))
    assert [shown(path) for path in tracked_texts() if pattern.search(path.read_text("utf-8", errors="replace"))] == []


def test_no_private_path_is_written_down() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|data/projects|mnt/[a-z]+)/[\w.-]+")
    assert [shown(path) for path in tracked_texts() if pattern.search(path.read_text("utf-8", errors="replace"))] == []


def test_public_functions_are_typed() -> None:
    untyped = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.returns is None or any(a.annotation is None for a in arguments if a.arg not in ("self", "cls")):
                    untyped.append(f"{shown(path)}:{node.lineno} {node.name}")
    assert untyped == []


def test_what_a_model_remembers_is_declared() -> None:
    """`extras`, `folder` and `quantized` are fields of a model, so nothing of ours asks whether it has them."""
    asked = re.compile(r"""getattr\([^()]*, ["'](extras|folder|quantized)["'],""")
    assert [shown(p) for p in SOURCES if p.is_relative_to(ROOT / "bitdance") and asked.search(p.read_text("utf-8"))] == []


def test_the_licence_is_apache() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_package_is_installed() -> None:
    """setup.py lists packages by hand; a folder that is forgotten there is missing from every wheel."""
    listed = re.search(r"packages=\[(.*?)\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL)
    assert listed is not None
    folders = {shown(path.parent).replace("/", ".") for path in SOURCES if path.name == "__init__.py"}
    assert folders == set(re.findall(r'"([\w.]+)"', listed[1]))
