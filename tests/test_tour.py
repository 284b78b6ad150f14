"""docs/tour.md is run from the first block to the last, and its outputs are those shown."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^\n]*?) -->\n)?^```(?P<kind>bash|python)\n(?P<code>.*?)^```\n(?:^```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    kind: str
    code: str
    shown: str | None
    needs: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    return [
        Block(m["kind"], m["code"], m["shown"], tuple((m["needs"] or "").replace(",", " ").split())) for m in BLOCK.finditer(text)
    ]


def fits(shown: str, output: str) -> bool:
    """`…` inside a line is any text; a line that is `…` alone is any number of lines."""
    pattern = ""
    for line in shown.splitlines():
        pattern += r"(?:.*\n)*?" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
    return re.fullmatch(pattern, output) is not None


def test_the_tour_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "REPO": str(ROOT), "PATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    found = blocks(text)
    assert len(found) == text.count("```bash\n") + text.count("```python\n") >= 10
    variables: dict[str, Any] = {}
    for block in found:
        start = time.perf_counter()
        if lacking := [name for name in block.needs if importlib.util.find_spec(name) is None]:
            print(f"left out, {', '.join(lacking)} not installed:\n{block.code}")
            continue
        if block.kind == "python":
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(block.code, "docs/tour.md", "exec"), variables)
            output = said.getvalue()
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{block.code}\n{run.stdout}\n{run.stderr}"
            output = run.stdout
        if block.shown is not None:
            assert fits(block.shown, output), f"{block.code}\nshown:\n{block.shown}\ncame:\n{output}"
        print(f"{time.perf_counter() - start:5.1f} s  {block.code.splitlines()[0]}")


@pytest.mark.parametrize(
    ("shown", "output", "expected"),
    [
        ("a\n", "a\n", True),
        ("a\n", "b\n", False),
        ("a\n", "a\nb\n", False),
        ("x … z\n", "x y z\n", True),
        ("…\nb\n", "a\na\nb\n", True),
        ("…\nb\n", "a\nc\n", False),
    ],
)
def test_an_output_that_is_not_the_one_shown_is_seen(shown: str, output: str, expected: bool) -> None:
    assert fits(shown, output) is expected
