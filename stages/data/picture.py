"""Safe decoding: whitelist of formats, size limit from the header, always 8-bit RGB."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_DAMAGES = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, OverflowError, zlib.error)


class BrokenPicture(ValueError):
    """An unusable picture. `reason` is a short code to count: empty, format, too large, truncated, damaged."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The bytes of a JPEG, PNG or WebP file → RGB picture, turned upright by its EXIF orientation.

    The size is read from the header and checked before any pixel is decoded. Transparency becomes white, 16 bits become
    8, CMYK becomes RGB without a colour profile, of an animation the first frame counts. Raises `BrokenPicture`.
    """
    with _opened(data) as picture:
        width, height = picture.size
        if width * height > max_pixels:
            raise BrokenPicture("too large", f"{width}×{height} is more than {max_pixels} pixels")
        try:
            picture.load()
            return _rgb_on_white(ImageOps.exif_transpose(picture))
        except _DAMAGES as error:
            reason = "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "damaged"
            raise BrokenPicture(reason, str(error)) from error


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) that `decode_picture` would give, from the header alone. Raises `BrokenPicture`."""
    with _opened(data) as picture:
        try:
            # the method of the base class: that of PNG decodes the whole picture in search of late EXIF
            turned = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1) in _TURNED
        except _DAMAGES as error:
            raise BrokenPicture("damaged", str(error)) from error
        width, height = picture.size
        return (height, width) if turned else (width, height)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BrokenPicture("empty", "no bytes")
    try:
        with warnings.catch_warnings():
            # our own limit decides, not Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BrokenPicture("too large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BrokenPicture("format", f"not a {', '.join(FORMATS)} file") from error
    except _DAMAGES as error:
        raise BrokenPicture("damaged", str(error)) from error


def _rgb_on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        # convert() would clip 16-bit grey at 255 instead of scaling it
        grey = np.asarray(picture).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        drawing = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawing.size, (255, 255, 255, 255)), drawing).convert("RGB")
    return picture.convert("RGB")
