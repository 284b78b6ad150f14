"""The report tells a model that follows its prompts from one that does not, and a quarter of the steps from all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitdance import BitDancePipeline
from distill import report, speed
from distill.growth import grow
from stages.data.pack import PackOptions, pack
from stages.data.sample import CaptionedPicture

pytestmark = pytest.mark.slow

TAUGHT = {"a fox, 3D style, on a blue background": ("fox", "blue"), "a cactus, 3D style, on a red background": ("cactus", "red")}
UNSEEN = {
    "a rocket, 3D style, on a black background": ("rocket", "black"),
    "a guitar, 3D style, on a green background": ("guitar", "green"),
}


class Drawn:
    """What the bundled model draws of some captions."""

    def __init__(self, captions: dict[str, tuple[str, str]]) -> None:
        self.captions, self.expected = captions, len(captions)

    def __iter__(self) -> Any:
        pipe = BitDancePipeline.from_pretrained("demo", device="cpu")
        for k, (caption, (concept, background)) in enumerate(self.captions.items()):
            picture = pipe(caption, 64, 64, seed=9).images[0]
            about = {"concept": concept, "style": "3d", "background": background}
            yield CaptionedPicture(f"p{k}", picture, [caption], about)

    def describe(self) -> dict[str, Any]:
        return {"name": "drawn"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Renderings, and a student that grew and learned nothing."""
    place = tmp_path_factory.mktemp("report")
    pack(Drawn(TAUGHT), place / "taught", PackOptions())
    pack(Drawn(UNSEEN), place / "unseen", PackOptions())
    pipe = BitDancePipeline.from_pretrained("demo", device="cpu")
    BitDancePipeline(grow(pipe.model, 8)).save_pretrained(place / "grown")
    return place


def test_the_report_tells_who_follows_the_prompt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", "teacher=demo", "--model", f"grown={place / 'grown'}"]
    shards = ["--train", str(place / "taught"), "--heldout", str(place / "unseen")]
    report.main([*models, *shards, "-o", str(place / "out" / "demo-64"), "--count", "2", "--steps", "8", "4"])
    said = json.loads((place / "out" / "demo-64.json").read_text())
    teacher, grown = said["models"]["teacher"], said["models"]["grown"]
    assert (teacher["ar_steps"], grown["ar_steps"]) == (4, 1)
    assert (teacher["tokens_per_step"], grown["tokens_per_step"]) == (16, 64)
    assert teacher["steps_8"]["taught"]["rendering"] == teacher["steps_8"]["heldout_pairs"]["rendering"] == 1
    assert grown["steps_8"]["taught"]["psnr"] < teacher["steps_8"]["taught"]["psnr"] - 3
    assert grown["vision"] > 2 * teacher["vision"]
    lines = (place / "out" / "demo-64.md").read_text().splitlines()
    assert lines[2].startswith("| teacher | 16, 4 | 2 |") and lines[3].startswith("| grown | 64, 1 | 2 |")
    assert Image.open(place / "out" / "demo-64.png").width > 2 * 64
    assert "100.0 %" in capsys.readouterr().out


def test_speed_is_told_against_the_first_model(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "RUNS", 1)
    models = ["--model", "teacher=demo", "--model", f"grown={place / 'grown'}"]
    speed.main([*models, "--steps", "2", "--batch", "1", "--dtype", "float32", "-o", str(tmp_path / "speed")])
    said = json.loads((tmp_path / "speed.json").read_text())
    assert all(speeds[0] > 0 for speeds in said["models"].values())
    assert "(1.00×)" in (tmp_path / "speed.md").read_text().splitlines()[2]


def test_a_model_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        report.models_of(["demo"])
