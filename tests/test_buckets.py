"""A picture is brought to the size of its resolution whose aspect ratio is nearest, without distortion."""

import math

import numpy as np
import pytest
from PIL import Image

from bitdance.folder.sizes import SizeRule, sizes_at
from stages.data.buckets import Buckets, fit

RULE = SizeRule(downsampling=16, patch_side=4, sides=frozenset(range(1, 257)))  # the published models


def test_a_resolution_holds_sizes_of_about_its_area() -> None:
    for resolution in (256, 512, 1024):
        sizes = sizes_at(RULE, resolution)
        assert (resolution, resolution) in sizes and len(sizes) >= 7
        for height, width in sizes:
            assert height % 64 == width % 64 == 0
            assert (width, height) in sizes
            assert math.sqrt(height * width) == pytest.approx(resolution, rel=0.13)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (1000, 1000, (512, 512)),
        (3000, 4000, (448, 576)),
        (900, 1600, (384, 704)),
        (1600, 900, (704, 384)),
        (100, 3000, (320, 896)),
    ],
)
def test_the_nearest_aspect_ratio_is_taken(height: int, width: int, size: tuple[int, int]) -> None:
    found = Buckets(RULE, (512,)).size_for(512, height, width)
    wished = math.log(height / width)
    best = min(abs(math.log(h / w) - wished) for h, w in sizes_at(RULE, 512))
    assert abs(math.log(found[0] / found[1]) - wished) == pytest.approx(best, abs=1e-6)
    assert found == size


def test_a_picture_reaches_the_resolutions_that_need_no_enlarging() -> None:
    buckets = Buckets(RULE, (256, 512, 1024))
    assert buckets.reach(1024, 1024, 1.0) == (256, 512, 1024)
    assert buckets.reach(1023, 1024, 1.0) == (256, 512)
    assert buckets.reach(800, 800, 1.5) == (256, 512, 1024)
    assert buckets.reach(100, 100, 1.0) == ()


def test_a_resolution_that_the_model_has_no_size_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.mix names 512 pixels.*multiples of 64"):
        Buckets(SizeRule(16, 4, frozenset({4, 8})), (512,))


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (64, 64), (63, 65), (1000, 70)])
def test_fitting_covers_the_size_and_keeps_the_middle_undistorted(shape: tuple[int, int]) -> None:
    height, width = shape
    size = (128, 64)
    # a white disc in the middle stays a disc in the middle
    yy, xx = np.mgrid[:height, :width]
    radius = 0.25 * min(height / 128, width / 64) * 64
    disc = ((yy - (height - 1) / 2) ** 2 + (xx - (width - 1) / 2) ** 2 < radius**2) * np.uint8(255)
    out = np.asarray(fit(Image.fromarray(disc).convert("RGB"), size))[..., 0] > 127
    assert out.shape == size
    rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
    assert abs(len(rows) - len(columns)) <= 2 and abs(len(rows) - 32) <= 3
    assert abs(rows.mean() - 63.5) <= 1 and abs(columns.mean() - 31.5) <= 1


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    picture = Image.effect_noise((64, 128), 50).convert("RGB")
    assert fit(picture, (128, 64)) is picture
