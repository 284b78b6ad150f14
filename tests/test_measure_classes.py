"""`bitdance measure classes`: the probe, the distance, what is kept, and the whole command on a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from class_model import golden_model, golden_tokenizer
from PIL import Image
from torch import Tensor, nn

from bitdance.folder.picture_model import PictureModel
from bitdance.generator import load_pipeline
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.sequence.classes import ClassEntry, ClassNames
from stages.cli import measure
from stages.data.folder import FolderOptions, FolderSource
from stages.data.pack import PackOptions, pack
from stages.measure import classes
from stages.measure.frechet import FrechetFeatures

pytestmark = pytest.mark.slow

NAMES = ClassNames(tuple(ClassEntry((f"class {n}",)) for n in range(10)))


class Means(nn.Module):
    """A stand-in for EfficientNet-Lite0: means and deviations of the channels. It counts what it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, levels_B3HW: Tensor) -> Tensor:
        self.seen += len(levels_B3HW)
        x = levels_B3HW.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1)


def test_the_probe_learns_what_can_be_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    class_N = torch.arange(300) % 3
    features_NF = torch.randn(300, 5, generator=generator) + 3 * torch.nn.functional.one_hot(class_N, 5)
    probe = classes.Probe(features_NF[:150], class_N[:150], 3)
    assert float(probe.right(features_NF[150:], class_N[150:]).float().mean()) > 0.9
    shuffled = class_N[torch.randperm(300, generator=generator)]
    assert float(probe.right(features_NF[150:], shuffled[150:]).float().mean()) < 0.5
    again = classes.Probe(features_NF[:150], class_N[:150], 3)
    assert torch.equal(probe.weight, again.weight)


def test_variety_is_the_mean_distance_of_two_pictures_of_a_class() -> None:
    features_NF = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    class_N = torch.tensor([0, 0, 0, 1, 1, 2])  # distances 5, 0 and 5; 0; a picture alone
    assert classes.variety(features_NF, class_N) == pytest.approx((10 / 3 + 0) / 2)
    assert classes.variety(features_NF[:1], class_N[:1]) is None


def test_the_distance_is_that_of_the_two_gaussians() -> None:
    """Of features with one dimension: (μ − ν)² + (σ − τ)²."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(500, 1, generator=generator), 3 * torch.randn(700, 1, generator=generator) + 2
    one, other = one.repeat(1, 2) * torch.tensor([1.0, 0.0]), other.repeat(1, 2) * torch.tensor([1.0, 0.0])
    expected = (one.mean(0) - other.mean(0))[0] ** 2 + (one.std(0) - other.std(0))[0] ** 2
    assert classes.distance(one, other) == pytest.approx(float(expected), rel=1e-3)
    assert classes.distance(one, one) == pytest.approx(0, abs=1e-4)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A model with ten classes of 64×64 pixels, and shards of pictures of the ten."""
    LAYOUT.save(
        PictureModel(golden_model(16), golden_tokenizer(), NAMES, {"defaults": {"num_inference_steps": 1}}), tmp_path / "model"
    )
    random = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "photos" / f"class {number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        levels = random.integers(0, 25, (64, 64, 3), dtype=np.uint8) + np.uint8(20 * (number % 10))
        Image.fromarray(levels).save(folder / f"{number}.png")
    pack(FolderSource(tmp_path / "photos", FolderOptions(classes=True)), tmp_path / "shards", PackOptions())
    return tmp_path


def test_figures_of_a_model_beside_real_pictures(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    network = Means()
    monkeypatch.setattr(classes, "lite0_features", lambda: FrechetFeatures("means", network, 6))
    shards = str(home / "shards")
    command = ["classes", "--model", str(home / "model"), "--train", shards, "--test", shards, "--cache", str(home / "cache")]
    command += ["--pictures", "20", "--probe", "40", "--guidance", "1", "2", "--json"]
    assert measure([*command, "--plot", str(home / "sweep.png"), "--grid", str(home / "grid.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["test pictures"]["right"] > 0.9 and found["probe"] == {"pictures": 40, "accuracy": rows["test pictures"]["right"]}
    assert rows["training pictures (floor)"]["count"] == 20
    assert rows["generated, guidance 1"]["count"] == 20 and rows["generated, guidance 2"]["pictures_per_s"] > 0
    assert rows["generated, guidance 1"]["distance"] > rows["training pictures (floor)"]["distance"]
    assert Image.open(home / "sweep.png").width > 300 and Image.open(home / "grid-guidance-2.png").width > 64
    seen = network.seen
    assert measure(command) == 0  # all of it is kept
    again = json.loads(capsys.readouterr().out)
    assert network.seen == seen
    for row in (*found["rows"], *again["rows"]):
        row.pop("pictures_per_s")
    assert found["rows"] == again["rows"]


def test_what_cannot_be_measured_is_refused(home: Path, capsys: Any) -> None:
    shards = str(home / "shards")
    rest = ["--train", shards, "--test", shards, "--cache", str(home / "cache")]
    assert measure(["classes", "--model", str(home / "model"), *rest, "--pictures", "1"]) == 2
    assert "at least 2 pictures" in capsys.readouterr().err
    assert measure(["classes", "--model", str(home / "nothing"), *rest]) == 2
    assert "nothing" in capsys.readouterr().err
    odd = [
        (["--set", "seed=3"], "unknown key seed; known are sampler"),
        (["--set", "samplr=3"], "did you mean sampler?"),
        (["--set", 'sampler="magic"'], "sampler = 'magic'"),
        (["--guidance", "1", "nan"], "'nan'; a finite number"),
        (["--guidance", "2000"], "guidance = 2000"),
        (["--steps", "0"], "steps = 0"),
        (["--preset", "magic"], "preset = 'magic'"),
    ]
    for more, words in odd:
        assert measure(["classes", "--model", str(home / "model"), *rest, *more]) == 2
        assert words in capsys.readouterr().err
    assert not (home / "cache").exists()


def test_pictures_of_another_dtype_are_others(home: Path) -> None:
    """What is kept of float32 is not taken for those of bfloat16."""
    for dtype in ("float32", "bfloat16"):
        pipe = load_pipeline(home / "model", "cpu", dtype)
        classes.Generated(pipe, home / "cache", "mark", 0).make(2, {"guidance_scale": 1.0})
    assert len(list((home / "cache" / "generated-mark").iterdir())) == 2


def test_fewer_pictures_than_features_have_a_distance_too() -> None:
    few = torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    many = torch.randn(50, 200, generator=torch.Generator().manual_seed(1))
    same = torch.ones(20, 200)  # of pictures that do not differ at all
    assert 0 < classes.distance(few, many) < 1000 and classes.distance(same, many) == pytest.approx(
        float((1 - many.double().mean(0)).square().sum() + many.double().var(0).sum()), rel=1e-6
    )
