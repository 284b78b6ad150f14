"""Pixels, grids, and PNGs that say how they were made."""

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bitdance.picture import grid, parameters_text, read_metadata, to_pil, to_uint8, to_unit, write_png

SETTINGS = {
    "prompt": 'ein Haus im Schnee 雪, "ja"\nin red',
    "seed": 7,
    "steps": 25,
    "guidance": 7.5,
    "height": 2,
    "width": 2,
    "model": "demo",
}


def test_pixels_are_the_published_rounding():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.004, 0.5, 0.996, 1.0, 9.0])
    images = values.repeat(1, 3, 1, 1)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 128, 191, 254, 255, 255]
    assert to_uint8(images).shape == (1, 1, 9, 3)
    assert to_unit(images)[0, 0, 0].tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.502, 0.75, 0.998, 1, 1])


def test_pictures_keep_rows_columns_and_colours():
    images = torch.full((2, 3, 2, 3), -1.0)
    images[1, 0, 0, 2] = 1.0
    pictures = to_pil(images)
    assert [p.size for p in pictures] == [(3, 2), (3, 2)]
    assert pictures[1].getpixel((2, 0)) == (255, 0, 0) and pictures[1].getpixel((0, 0)) == (0, 0, 0)


def test_grid_places_pictures_in_reading_order():
    colours = ["red", "lime", "blue", "black", "yellow"]
    sheet = grid([Image.new("RGB", (4, 2), c) for c in colours], columns=3, gap=1)
    assert sheet.size == (3 * 5 - 1, 2 * 3 - 1)
    assert [sheet.getpixel(p) for p in ((0, 0), (5, 0), (10, 0), (0, 3), (5, 3), (10, 3), (4, 0))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (0, 0, 0),
        (255, 255, 0),
        (255, 255, 255),
        (255, 255, 255),
    ]
    assert grid([Image.new("RGB", (4, 2))]).size == (4, 2)
    with pytest.raises(ValueError, match="at least one"):
        grid([])


def test_settings_come_back_from_the_png(tmp_path):
    write_png(Image.new("RGB", (2, 2), "red"), tmp_path / "a.png", SETTINGS)
    assert read_metadata(tmp_path / "a.png") == SETTINGS
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.getpixel((1, 1)) == (255, 0, 0)
        assert picture.info["parameters"] == parameters_text(SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_parameters_are_readable():
    text = parameters_text(SETTINGS)
    assert text.startswith(SETTINGS["prompt"] + "\n")
    assert text.endswith("Steps: 25, Guidance: 7.5, Seed: 7, Width: 2, Height: 2, Model: demo")


def test_a_png_without_metadata_has_no_text(tmp_path):
    write_png(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds no settings"):
        read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_foreign_or_broken_settings_are_an_error(tmp_path, text):
    info = PngInfo()
    info.add_itxt("bitdance", text)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="holds no settings"):
        read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_what_is_no_png_is_an_error(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="not a readable PNG"):
        read_metadata(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="b.png"):
        read_metadata(tmp_path / "b.png")


def test_other_picture_formats_are_not_opened(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(ValueError, match="not a readable PNG"):
        read_metadata(tmp_path / "a.png")


def test_a_failed_write_leaves_the_old_picture(tmp_path):
    write_png(Image.new("RGB", (2, 2), "red"), tmp_path / "a.png", SETTINGS)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(TypeError):
        write_png(Image.new("RGB", (2, 2), "blue"), tmp_path / "a.png", {"prompt": object()})
    assert (tmp_path / "a.png").read_bytes() == before
