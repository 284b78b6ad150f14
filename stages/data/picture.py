"""Safe decoding: whitelist of formats, size limit from the header, always 8-bit RGB."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from lfq_tokenizer import limits
from stages.data.colour import rgb_on_white
from stages.data.container import Bare, BrokenPicture, bare, orientation_in

__all__ = ["ENDINGS", "FORMATS", "MAX_PIXELS", "BrokenPicture", "decode_picture", "upright_size"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # and AVIF, where Pillow can
MAX_PIXELS = limits.PICTURE_PIXELS
# the endings of these formats, and the one under which a pack keeps such a file
ENDINGS = dict.fromkeys(("jpg", "jpeg", "jfif", "jpe", "jif", "pjpeg", "pjp", "mpo"), "jpg") | {"png": "png", "apng": "png"}
ENDINGS |= {"webp": "webp", "gif": "gif", "bmp": "bmp", "dib": "bmp", "avif": "avif", "tif": "tif"}
ENDINGS |= {"avifs": "avif", "tiff": "tif"}
ANIMATED = "animation or several pages: first one taken"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = (5, 6, 7, 8)  # orientations that swap width and height


@dataclass(frozen=True)
class _Opened:
    """A picture whose pixels are not decoded yet, and what its file tells about it."""

    picture: Image.Image
    told: Bare


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS, notes: Counter[str] | None = None) -> Image.Image:
    """The bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file → RGB picture, turned upright by its EXIF orientation.

    The size is read from the header and checked before any pixel is decoded. Transparency becomes white, 16 bits become 8,
    colours with a profile become sRGB, of an animation the first frame counts, which is counted in `notes`. Raises
    `BrokenPicture`.
    """
    opened = _opened(data, max_pixels)
    if notes is not None and opened.told.more:
        notes[ANIMATED] += 1
    with opened.picture as picture, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture.load()
            upright = rgb_on_white(picture, opened.told.profile, opened.told.inverted)
            turn = _TURNS.get(opened.told.orientation)
            return upright if turn is None else upright.transpose(turn)
        except Exception as error:  # a damaged picture raises nearly anything
            raise _broken(error) from error


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) that `decode_picture` would give, from the header alone. Raises `BrokenPicture`."""
    opened = _opened(data, 0)
    width, height = opened.picture.size
    return (height, width) if opened.told.orientation in _SWAPPING else (width, height)


def _opened(data: bytes, max_pixels: int) -> _Opened:
    if not data:
        raise BrokenPicture("empty", "no bytes")
    try:
        told = bare(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limits decide
            if data[4:12] in (b"ftypavif", b"ftypavis"):
                return _opened_avif(told, max_pixels)
            picture = Image.open(io.BytesIO(told.data), formats=FORMATS)
        _check_size(picture.size, max_pixels)
        info: Any = picture.info
        if picture.format == "WEBP":
            profile = info.get("icc_profile", b"")
            told = replace(told, orientation=orientation_in(info.get("exif", b"")), profile=profile[: limits.PROFILE_BYTES])
        if picture.format in ("WEBP", "GIF"):
            told = replace(told, more=_has_more(picture))
        if picture.format == "BMP" and picture.size[1] < 0:
            raise BrokenPicture("damaged", "a negative height")
        return _Opened(picture, told)
    except BrokenPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenPicture("too large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BrokenPicture("format", f"not a {', '.join(FORMATS)} or AVIF file") from error
    except Exception as error:
        raise _broken(error) from error


def _opened_avif(told: Bare, max_pixels: int) -> _Opened:
    """By Pillow's decoder itself: its reader of AVIF files goes through all of EXIF, which is neither needed nor bounded."""
    try:
        from PIL import AvifImagePlugin

        decoder = AvifImagePlugin._avif.AvifDecoder(told.data, AvifImagePlugin.DECODE_CODEC_CHOICE, 1)
        size, frames, mode, profile, _, orientation, _ = decoder.get_info()
    except (ImportError, AttributeError) as error:
        raise BrokenPicture("format", "this Pillow does not read AVIF; install a newer one") from error
    _check_size(size, max_pixels)
    told = replace(told, orientation=orientation, profile=(profile or b"")[: limits.PROFILE_BYTES], more=frames > 1)
    if not max_pixels:
        return _Opened(_Sized(size), told)
    return _Opened(Image.frombytes(mode, size, decoder.get_frame(0)[0]), told)


class _Sized(Image.Image):
    """A picture of which only the size is known."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if max_pixels and width * height > max_pixels:
        raise BrokenPicture("too large", f"{width}×{height} is more than {max_pixels} pixels")


def _has_more(picture: Image.Image) -> bool:
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # a broken second frame
        return False


def _broken(error: Exception) -> BrokenPicture:
    reason = "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "damaged"
    return BrokenPicture(reason, str(error) or type(error).__name__)
