"""examples/bitdance.ipynb runs from the first cell to the last, in plain Python."""

import ast
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parent.parent / "examples" / "bitdance.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_clean() -> None:
    """Each cell has an id of its own, as the format asks; no output is kept, so that a change shows what was changed."""
    assert len({cell["id"] for cell in cells()}) == len(cells())
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells() if cell["cell_type"] == "code")


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for cell in (cell for cell in cells() if cell["cell_type"] == "code"):
            *statements, last = ast.parse("".join(cell["source"])).body
            if not isinstance(last, ast.Expr):
                statements, last = [*statements, last], ast.Expr(ast.Constant(None))
            exec(compile(ast.Module(statements, []), f"cell {cell['id']}", "exec"), names)
            shown[cell["id"]] = eval(compile(ast.fix_missing_locations(ast.Expression(last.value)), cell["id"], "eval"), names)
    pictures = [name for name, value in shown.items() if isinstance(value, Image.Image)]
    assert pictures == ["draw", "words", "bits", "flip", "encode"]
    assert any("zorgle" in str(warning.message) for warning in said)
    assert shown["bench"] == 0 and "floor" in capsys.readouterr().out
    assert [bits for _, bits in names["done"]] == [1024 * block for block in range(1, 10)]
    assert float(names["difference"].std()) < 30
