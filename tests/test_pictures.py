"""Pictures are decoded safely: whitelisted formats, a limit from the header, and a reason for every refusal."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from small_files import picture_bytes

from stages.data.picture import BrokenPicture, decode_picture


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns * 9, rows * 14, columns * 4 + rows * 4], -1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BrokenPicture) as caught:
        decode_picture(data, **options)
    return caught.value.reason


def test_a_png_comes_back_pixel_for_pixel():
    assert np.array_equal(np.asarray(decode_picture(picture_bytes(gradient(), "PNG"))), np.asarray(gradient()))


@pytest.mark.parametrize("width, height", [(8001, 8000), (12000, 12000), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(monkeypatch, width, height):
    def load(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert reason(png_header(width, height)) == "too large"


def test_the_limit_is_inclusive_and_an_argument():
    data = picture_bytes(gradient(10, 10), "PNG")
    assert decode_picture(data, max_pixels=100).size == (10, 10)
    assert reason(data, max_pixels=99) == "too large"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(form, kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = picture_bytes(noise, form)
    assert reason(data[: int(kept * len(data))]) in ("truncated", "damaged")


def test_a_truncated_jpeg_says_so():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = picture_bytes(noise, "JPEG")
    assert reason(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("form", ["PPM", "ICO", "TGA", "SGI", "DDS"])
def test_other_formats_are_refused(form):
    assert reason(picture_bytes(gradient(), form)) == "format"


def test_nothing_and_noise_are_refused():
    assert reason(b"") == "empty"
    assert reason(b"\x89PNG\r\n\x1a\n") in ("format", "damaged")
    assert reason(bytes(range(256)) * 8) == "format"


def test_cmyk_becomes_rgb():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture = decode_picture(picture_bytes(red, "JPEG", quality=95))
    assert picture.mode == "RGB"
    pixel = picture.getpixel((8, 8))
    assert pixel[0] > 230 and pixel[1] < 25 and pixel[2] < 25


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    picture = decode_picture(picture_bytes(grey, "PNG"))
    assert picture.mode == "RGB"
    assert [picture.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_palette_with_alpha_lies_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    picture = decode_picture(picture_bytes(palette, "PNG", transparency=0))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((1, 0)) == (200, 0, 0)


def test_alpha_lies_on_white():
    picture = decode_picture(picture_bytes(Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG"))
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (204, 204, 204)
    assert decode_picture(picture_bytes(Image.new("LA", (4, 4), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied():
    upright = gradient(24, 16)
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = decode_picture(picture_bytes(sideways, "PNG", exif=exif))
    assert picture.size == (24, 16)
    assert np.array_equal(np.asarray(picture), np.asarray(upright))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = picture_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_picture(data).getpixel((4, 4)) == (250, 0, 0)


def test_a_strip_keeps_its_size():
    assert decode_picture(picture_bytes(Image.new("RGB", (1, 10000), (1, 2, 3)), "PNG")).size == (1, 10000)


def test_damaged_bytes_raise_nothing_else():
    draw = np.random.default_rng(1)
    for form in ("JPEG", "PNG", "WEBP"):
        whole = np.frombuffer(picture_bytes(gradient(), form), dtype=np.uint8)
        for _ in range(100):
            data = whole.copy()
            data[draw.integers(0, len(data), 6)] = draw.integers(0, 256, 6)
            try:
                assert decode_picture(data.tobytes()).mode == "RGB"
            except BrokenPicture as error:
                assert error.reason
