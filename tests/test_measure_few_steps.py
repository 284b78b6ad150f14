"""`bitdance measure few_steps`: what is counted, and the whole command for models of prompts and of classes on tiny pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_files import picture_bytes, write_samples
from test_measure_classes import Means, home  # noqa: F401 (a fixture)

from bitdance import load_pipeline
from bitdance.folder.parts import DEMO
from lfq_tokenizer.json_file import read_json, write_json
from stages.cli import measure
from stages.measure import few_steps
from stages.measure.frechet import FrechetFeatures

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "lite0_features", lambda: FrechetFeatures("means", Means(), 6))


def student_of(folder: Path, out: Path, **defaults: Any) -> Path:
    """The same weights, said to be taught few evaluations."""
    shutil.copytree(folder, out)
    extras = read_json(out / "bitdance.json")
    known = {name: value for name, value in extras.get("defaults", {}).items() if name != "preset"}
    taught = {"sampler": "direct", "num_inference_steps": 2, "guidance_scale": 1.0}
    write_json(extras | {"defaults": known | taught | defaults}, out / "bitdance.json")
    return out


def renderings(path: Path, concepts: list[str]) -> Path:
    """Shards of pictures with the attributes of icons."""
    random = np.random.default_rng(0)
    samples = {}
    for number, concept in enumerate(concepts):
        picture = Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        about = {"captions": [f"a {concept}"], "attributes": {"concept": concept, "style": "3d", "background": "white"}}
        samples[str(number)] = {"json": json.dumps(about).encode(), "png": picture_bytes(picture)}
    return write_samples(path, samples)


def test_bit_entropy_is_that_of_each_bit_over_the_seeds() -> None:
    bits_KSN = torch.tensor([[[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]]).bool()  # always, a coin, never
    assert few_steps.bit_entropy(bits_KSN) == pytest.approx(1 / 3)
    quarter = torch.tensor([[[1], [0], [0], [0]]]).bool()
    assert few_steps.bit_entropy(quarter) == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))


def test_rows_of_the_head_are_those_that_it_computes(tmp_path: Path) -> None:
    pipe = load_pipeline("demo", "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64}
    for settings, rows in (
        ({"sampler": "dpmpp_2m", "num_inference_steps": 3, "guidance_scale": 2.0}, 8),
        ({"sampler": "dpmpp_2m", "num_inference_steps": 1, "guidance_scale": 1.0}, 2),
    ):
        made = few_steps.make(few_steps.Way("", pipe, settings), ["a fox", "a guitar"], 2, 5, size)
        assert made.rows == rows and made.levels_NHW3.shape == (4, 64, 64, 3) and made.per_second > 0
        second = pipe("a fox", seed=6, output_type="bits", **size, **settings).bits
        assert torch.equal(made.bits_KSN[0, 1], second.flatten() > 0)  # the seeds of a condition count up


def test_a_student_of_prompts_beside_its_teacher(tmp_path: Path, capsys: Any) -> None:
    student = student_of(DEMO, tmp_path / "student", preset="quick")
    train, test = renderings(tmp_path / "train.tar", ["fox", "guitar", "cup"]), renderings(tmp_path / "test.tar", ["house"])
    asked = ["few_steps", "--teacher", "demo", "--student", str(student), "--train", str(train), "--test", str(test)]
    few = ["--evaluations", "1", "2", "--conditions", "2", "--each", "2", "--count", "1", "--guidance", "2"]
    out = tmp_path / "report"
    assert measure([*asked, *few, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    found = read_json(out / "few_steps.json")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["teacher, own settings", "student, 1", "teacher, dpmpp_2m, 2", "student, 2"]
    assert [rows[name]["rows"] for name in ("student, 1", "teacher, dpmpp_2m, 2", "student, 2")] == [1, 4, 2]
    assert found["pictures"] == 4 and found["conditions"] == 2 and found["real"] == 4
    for row in rows.values():
        assert row["distance"] > 0 and row["variety"] > 0 and 0 < row["bits apart"] < 1 and 0 < row["bit entropy"] <= 1
        assert {row["right"], row["held out"]} <= {0.0, 1.0} and 0 < row["PSNR"] < 60 and row["pictures/s"] > 0
    assert shown == (out / "few_steps.md").read_text() and "| student, 2" in shown
    with Image.open(out / "few_steps.png") as picture:
        assert picture.size == (2 * 64 + 4, 4 * 64 + 3 * 4)
    assert measure([*asked[:3], "--student", "demo", *asked[5:], *few, "-o", str(out)]) == 2
    assert "was not distilled to few evaluations" in capsys.readouterr().err
    assert measure([*asked, "--each", "1", "-o", str(out)]) == 2
    assert "at least 2 seeds of each" in capsys.readouterr().err


def test_a_student_of_classes_beside_its_teacher(home: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    student, shards = student_of(home / "model", tmp_path / "student"), str(home / "shards")
    asked = ["few_steps", "--teacher", str(home / "model"), "--student", str(student), "--train", shards, "--test", shards]
    assert measure([*asked, "--evaluations", "2", "--each", "2", "--guidance", "1", "-o", str(tmp_path / "r"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["rows"] for row in found["rows"]] == [2, 2, 2]  # own: one step of Euler–Maruyama and the last
    assert found["conditions"] == 10 and found["pictures"] == 20 and found["real"] == 40
    assert all(0 <= row["right"] <= 1 and row["variety"] is not None and "PSNR" not in row for row in found["rows"])
