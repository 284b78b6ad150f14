"""What is installed is whole: the bundled model, the page of the server, the typing marks; versions and metadata agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitdance import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("lfq_tokenizer", "bitdance", "bitdance_diffusers", "comfyui_bitdance", "stages", "distill")
WEIGHTS = ("model", "ae", "vision_head", "projector")
MODEL = {"config.json", "tokenizer.json", "bitdance.json", *(f"{name}.safetensors" for name in WEIGHTS)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files that a wheel is packed from."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_file_of_the_packages_is_in_the_wheel(built: set[str]) -> None:
    files = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == built


@pytest.mark.slow
def test_the_bundled_model_is_in_the_wheel(built: set[str]) -> None:
    assert {f"bitdance/pretrained/demo/{name}" for name in MODEL} <= built
    assert {f"bitdance/serve/page/{path.name}" for path in (ROOT / "bitdance/serve/page").glob("*")} <= built


def test_versions_agree() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", changes, re.MULTILINE)
    assert versions[0] == "Unreleased" and (__version__ in versions or f"Becomes {__version__}" in changes)
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_a_report_of_a_bug_asks_for_what_doctor_says() -> None:
    assert "bitdance doctor --json" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8")


def test_a_release_publishes_nothing() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert "make dist" in text and not re.search(r"twine upload|pypi-publish|uv publish", text)
