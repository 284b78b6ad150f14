"""A study of ways: equal operations, what is done stays, tables, power laws; the studies that ship name configs that exist."""

import io
import json
import math
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_measure_classes import Means

from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.scale_vae import ScaleConfig, ScaleTokenizer
from stages import cli
from stages.config import load_config
from stages.data.folder import FolderOptions, FolderSource
from stages.data.pack import PackOptions, pack
from stages.measure import classes
from stages.measure.evidence import run
from stages.measure.evidence.__main__ import main
from stages.measure.evidence.laws import laws, points, power_law
from stages.measure.evidence.study import read_study
from stages.measure.frechet import FrechetFeatures

ROOT = Path(__file__).parent.parent
STUDY = """
title = "two ways"
out = "{home}/out"
operations = 2e9
pictures = 8
probe = 12
batch_size = 4
seeds = [1, 2]
train = ["{home}/shards"]
test = ["{home}/shards"]
set = ["data.train=['{home}/shards']", "data.heldout=['{home}/shards']", "run.workers=0", "run.precision='float32'"]

[[ways]]
name = "patches"
group = "patches"
config = "{root}/configs/cifar/class_1x.toml"
set = ["class_patch.tokenizer='{home}/bits'", "class_patch.size=16", "class_patch.class_count=3",
  "class_patch.model.dim=32", "class_patch.model.n_head=1", "class_patch.model.n_layer=1", "class_patch.model.diff_dim=32"]
guidance = [1.0, 2.0]
sample = {{ num_inference_steps = 1 }}

[[ways]]
name = "scales"
config = "{root}/configs/cifar/infinity.toml"
set = ["next_scale.tokenizer='{home}/scales'", "next_scale.size=16", "next_scale.class_count=3",
  "next_scale.model.width=32", "next_scale.model.heads=1", "next_scale.model.depth=1"]
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "photos" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        levels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8) + np.uint8(60 * (number % 3))
        Image.fromarray(levels).save(folder / f"{number}.png")
    pack(FolderSource(tmp_path / "photos", FolderOptions(size=16, classes=True)), tmp_path / "shards", PackOptions())
    torch.manual_seed(0)
    LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8)).save_pretrained(tmp_path / "bits")
    sides = ((1, 1), (2, 2), (4, 4))
    ScaleTokenizer(ScaleConfig("bits", 8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, sides=sides)).save_pretrained(
        tmp_path / "scales"
    )
    monkeypatch.setattr(classes, "lite0_features", lambda: FrechetFeatures("means", Means(), 6))

    def here(*arguments: str, show: bool = False) -> str:
        """The same command in this process."""
        out = io.StringIO()
        with redirect_stdout(out):
            assert {"train": cli.train, "measure": cli.measure}[arguments[0]](list(arguments[1:])) == 0
        return out.getvalue()

    monkeypatch.setattr(run, "_bitdance", here)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(home=tmp_path, root=ROOT))
    return path


@pytest.mark.slow
def test_ways_train_with_equal_operations_and_what_is_done_stays(study: Path, monkeypatch: Any, capsys: Any) -> None:
    for part in ("0/2", "1/2"):
        assert main(["run", str(study), "--part", part]) == 0
    results = [json.loads(path.read_text()) for path in sorted((study.parent / "out").glob("*.json"))]
    assert [(r["name"], r["seed"]) for r in results] == [("patches", 1), ("patches", 2), ("scales", 1), ("scales", 2)]
    for result in results:
        each = result["operations"] / result["pictures"]
        assert abs(result["operations"] - 2e9) <= each * 4 / 2 or result["steps"] == run.SMALLEST_STEPS
        assert result["parameters"] > 1000 and any("heldout/" in name for name in result["heldout"])
    assert results[0]["steps"] != results[2]["steps"]  # they cost differently
    assert results[0]["rows"] != results[1]["rows"]
    monkeypatch.setattr(run, "_bitdance", lambda *arguments, show=False: pytest.fail("all of it is done"))
    assert main(["run", str(study)]) == 0
    capsys.readouterr()
    assert main(["report", str(study), "--out", str(study.parent / "docs")]) == 0
    printed = capsys.readouterr().out
    assert "| patches, guidance" in printed and " ± " in printed and "scales, guidance 1" in printed
    assert {p.name for p in (study.parent / "docs").iterdir()} == {"study.md", "study.json", "study.png", "study-pictures.png"}
    with Image.open(study.parent / "docs" / "study-pictures.png") as pictures:
        assert pictures.width > 3 * 16 and pictures.height > 2 * 16  # three classes, two ways
    # on another machine, with the report alone
    shutil.rmtree(study.parent / "out")
    assert main(["run", str(study), "--done", str(study.parent / "docs" / "study.json")]) == 0
    assert [json.loads(path.read_text()) for path in sorted((study.parent / "out").glob("*.json"))] == results
    assert main(["report", str(study), "--out", str(study.parent / "again")]) == 0
    assert {p.name for p in (study.parent / "again").iterdir()} == {"study.md", "study.json", "study.png"}
    study.write_text(study.read_text().replace("two ways", "others"))
    with pytest.raises(ValueError, match="give a report of 'others'"):
        run.take_over(read_study(study, False), study.parent / "docs" / "study.json")


RESULT = {"name": "patches", "group": "", "seed": 1, "parameters": 9, "operations": 2e9, "steps": 10, "pictures": 40}
RESULT |= {"heldout": {"heldout/velocity": 1.0}, "curve": [], "rows": []}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([], "is of []; give a report of 'two ways'"),
        ({"study": "two ways"}, "holds None"),
        ({"study": "two ways", "results": [RESULT, "x"]}, "holds 'x'"),
        ({"study": "two ways", "results": [{"name": "patches", "seed": 1}]}, "no result of as much training"),
        ({"study": "two ways", "results": [RESULT | {"heldout": {}}]}, "no result of as much training"),
        ({"study": "two ways", "results": [RESULT | {"operations": 2e6}]}, "no result of as much training"),  # of --smoke
        ({"study": "two ways", "results": [RESULT | {"steps": "10"}]}, "no result of as much training"),
    ],
)
def test_what_is_no_report_of_the_study_counts_for_nothing(tmp_path: Path, told: Any, words: str) -> None:
    (tmp_path / "study.toml").write_text(STUDY.format(home=tmp_path, root=ROOT))
    (tmp_path / "told.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=re.escape(words)):
        run.take_over(read_study(tmp_path / "study.toml", False), tmp_path / "told.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ways", "ablations", "scaling"])
def test_the_reports_of_this_project_are_taken_over(tmp_path: Path, name: str) -> None:
    told = ROOT / "docs" / "evidence" / f"{name}.json"
    study = replace(read_study(ROOT / "configs" / "evidence" / f"{name}.toml", False), out=str(tmp_path / "out"))
    run.take_over(study, told)
    written = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(written) == len(json.loads(told.read_text())["results"]) and all(result["curve"] for result in written)


@pytest.mark.slow
def test_losses_alone_on_the_way(study: Path, capsys: Any) -> None:
    text = study.read_text().replace("operations = 2e9", "samples = 16\nvalidations = 4")
    study.write_text(text.replace("pictures = 8", "pictures = 0"))
    assert main(["run", str(study)]) == 0
    result = json.loads((study.parent / "out" / "scales-1.json").read_text())
    assert [point["pictures"] for point in result["curve"]] == [4, 8, 12, 16] and result["rows"] == []
    assert result["curve"][-1]["loss"] == next(v for k, v in result["heldout"].items() if k.count("/") == 1)
    capsys.readouterr()
    assert main(["report", str(study), "--out", str(study.parent / "docs")]) == 0
    assert "| scales, 2 | " in capsys.readouterr().out
    assert {p.name for p in (study.parent / "docs").iterdir()} == {"study.md", "study.json", "study.png"}


def test_laws_of_a_group() -> None:
    """loss = parameters^-0.1 · pictures^-0.2, in three sizes: what is fitted of each axis is known."""

    def result(size: float) -> dict[str, Any]:
        curve = [{"pictures": n, "loss": size**-0.1 * n**-0.2} for n in (100, 200, 400, 800)]
        heldout = {"heldout/pictures": 9.0, "heldout/tokens": curve[-1]["loss"]}
        return {"group": "g", "parameters": size, "pictures": 800, "operations": 800 * size, "heldout": heldout, "curve": curve}

    results = [result(size) for size in (1e5, 3e5, 1e6)]
    found = points(results)
    assert power_law(*zip(*found["parameters"], strict=True))[1] == pytest.approx(-0.1)
    assert power_law(*zip(*found["pictures"], strict=True))[1] == pytest.approx(-0.2)
    losses = [loss for _, loss in found["operations"]]
    assert losses == sorted(losses, reverse=True) and len(losses) >= 4
    assert laws(results).count("| g |") == 3 and laws(results[:2]) == ""


def test_a_power_law_is_found_with_its_error() -> None:
    x = [1e5, 3e5, 1e6, 3e6, 1e7]
    a, b, error = power_law(x, [2.0 * value**-0.1 for value in x])
    assert (a, b) == pytest.approx((2.0, -0.1)) and error < 1e-9
    noisy = [2.0 * value**-0.1 * factor for value, factor in zip(x, (1.01, 0.99, 1.01, 0.99, 1.01), strict=True)]
    slope = np.polyfit(np.log(x), np.log(noisy), 1)[0]
    residual = np.log(noisy) - np.polyval(np.polyfit(np.log(x), np.log(noisy), 1), np.log(x))
    spread = np.log(x) - np.mean(np.log(x))
    assert power_law(x, noisy)[1:] == pytest.approx((slope, math.sqrt(residual @ residual / 3 / (spread @ spread))))
    with pytest.raises(ValueError, match="at least 3"):
        power_law([1, 2], [1, 2])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "evidence").glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_ship_can_be_read(path: Path) -> None:
    for smoke in (False, True):
        study = read_study(path, smoke)
        assert (study.out.endswith("-smoke")) == smoke and len(study.ways) > 5
        for way in study.ways:
            load_config(ROOT / way.config, [*study.set, *way.set])


def test_a_study_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('out = "x"\noperations = 1e9\n[[ways]]\nname = "a"\n[[ways]]\nname = "A"\n')
    with pytest.raises(ValueError, match="names of their own"):
        read_study(path, False)
    path.write_text('out = "x"\noperation = 1e9\n')
    with pytest.raises(ValueError, match="did you mean operations"):
        read_study(path, False)
