"""The comparison of bottlenecks is fair: equal bits, equal pictures, equal steps; and what it writes is what it measured."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.config import TokenizerTraining
from stages.data.folder import FolderOptions, FolderSource
from stages.data.pack import PackOptions, pack
from stages.measure import compare, compare_train
from stages.measure.bottlenecks import BOTTLENECKS, build_bottleneck
from stages.measure.compare_report import report, table
from stages.measure.compare_train import Setting, load_one

pytestmark = pytest.mark.slow

pytest.importorskip("vector_quantize_pytorch", reason="the alternatives are those of vector-quantize-pytorch")
TINY = {"ch": 32, "ch_mult": [1, 1], "crop": 16, "batch_size": 4, "steps": 2, "warmup_steps": 1}
CASES = [(name, bits) for name in BOTTLENECKS for bits in (8, 16, 32) if not (name == "vq" and bits > 8)]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_bottleneck_holds_the_bits_it_says_and_passes_the_gradient_on(name: str, bits: int) -> None:
    bottleneck = build_bottleneck(name, bits, TokenizerTraining())
    expected = {"continuous": 16 * math.ceil(bits / 16), "continuous-width": 16 * bits}.get(name, bits)
    assert bottleneck.bits == pytest.approx(expected)
    z = torch.randn(4, bottleneck.channels, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codes, loss = bottleneck.quantize.train()(z)
    assert codes.shape == z.shape and loss.shape == ()
    codes.square().sum().backward()
    assert z.grad is not None and z.grad.isfinite().all() and float(z.grad.abs().max()) > 0
    with torch.no_grad():
        first, second = (bottleneck.quantize.eval()(z)[0] for _ in range(2))
    assert torch.equal(first, second)
    if name in ("lfq", "bsq"):
        torch.testing.assert_close(first.abs(), torch.ones_like(first))
    if name == "fsq":  # no channel takes more values than its levels
        assert max(len(first[:, c].unique()) for c in range(first.shape[1])) <= 8


def test_unknown_names_and_rates_are_errors() -> None:
    with pytest.raises(ValueError, match="known are lfq, hbq"):
        build_bottleneck("lfg", 16, TokenizerTraining())
    with pytest.raises(ValueError, match="multiples of 16"):
        build_bottleneck("fsq", 24, TokenizerTraining())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for number, kind in enumerate(("photographs", "icons")):
        folder = tmp_path_factory.mktemp(kind)
        random = np.random.RandomState(number)
        for i in range(6):
            Image.fromarray(random.randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text("noise\n")
        pack(FolderSource(folder, FolderOptions(size=16)), folder / "shards", PackOptions())
        found[kind] = str(folder / "shards")
    return found


def run(folder: Path, shards: dict[str, str], *more: str, **setting: object) -> None:
    compare.main(["train", str(folder), "--train", *shards.values(), "--setting", json.dumps(TINY | setting), *more])


def test_runs_are_trained_once_measured_and_reported(tmp_path: Path, shards: dict[str, str]) -> None:
    for part in ("0/2", "1/2"):
        run(tmp_path, shards, "--part", part, "--runs", "lfq:8", "continuous:16", "bsq:8")
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert set(written) == {"lfq-8.json", "continuous-16.json", "bsq-8.json"}
    run(tmp_path, shards, "--runs", "lfq:8")
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")} == written
    model, facts = load_one(tmp_path / "lfq-8.json")
    assert facts["setting"]["steps"] == 2 and not model.training
    out = tmp_path / "out"
    rows = report(tmp_path, [[shard] for shard in shards.values()], None, out)
    assert [(row["name"], row["bits"]) for row in rows] == [("lfq", 8), ("bsq", 8), ("continuous", 16)]
    images = compare.load_pictures([[shards["icons"]]])[0].float() / 127.5 - 1
    with torch.no_grad():
        levels, made = ((127.5 * x + 128).clamp(0, 255).floor() for x in (images, model(images)[0]))
    psnr = 10 * torch.log10(255**2 / (made - levels).square().mean(dim=(1, 2, 3))).mean()
    assert rows[0]["icons"]["psnr"] == pytest.approx(float(psnr), abs=1e-3)
    assert json.loads((out / "comparison.json").read_text())["pictures"] == {"photographs": 6, "icons": 6}
    assert all(Image.open(out / name).size[0] > 300 for name in ("comparison.png", "scaling.png"))


def test_all_runs_see_the_same_pictures() -> None:
    pictures = [torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8) for _ in range(2)]
    setting = Setting(crop=16, batch_size=4)
    first, again, later = (compare_train._batch(pictures, setting, step) for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, later) and first.shape == (4, 3, 16, 16)


def test_the_best_discrete_figure_of_a_rate_is_bold() -> None:
    def row(name: str, psnr: float, lpips: float) -> dict[str, object]:
        kinds = {kind: {"psnr": psnr} for kind in ("photographs", "icons")}
        return {"name": name, "bits": 16, "psnr": psnr, "ssim": 0.5, "lpips": lpips, **kinds}

    lines = table([row("lfq", 20.0, 0.4), row("fsq", 19.0, 0.3), row("continuous", 25.0, 0.1)]).splitlines()[2:]
    assert "**20.00**" in lines[0] and "**0.400**" not in lines[0]
    assert "**0.300**" in lines[1] and "**19.00**" not in lines[1]
    assert "**" not in lines[2]


def test_runs_of_different_settings_are_not_compared(tmp_path: Path, shards: dict[str, str]) -> None:
    run(tmp_path, shards, "--runs", "lfq:8")
    run(tmp_path, shards, "--runs", "fsq:8", steps=1)
    with pytest.raises(ValueError, match="different settings"):
        report(tmp_path, [[shard] for shard in shards.values()], None, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no trained run"):
        report(tmp_path / "absent", [[shard] for shard in shards.values()], None, tmp_path / "out")
