"""Whatever a picture's pixels are → 8-bit RGB in sRGB on white."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # modes that a profile can be about


def rgb_on_white(picture: Image.Image, profile: bytes = b"", inverted: bool = True) -> Image.Image:
    """A loaded picture → RGB. Transparency becomes white, 16 bits become 8; the colours of an ICC `profile` are brought to sRGB,
    and a profile that is broken or about other colours than the picture's is ignored.

    inverted: whether CMYK is stored inverted, as Pillow takes for granted. ValueError for a mode without an RGB picture.
    """
    picture = _eight_bits(picture)
    if picture.mode == "CMYK" and not inverted:
        picture = ImageChops.invert(picture)
    if picture.mode in ("LA", "La", "RGBa", "PA", "P") or "transparency" in picture.info:
        picture = picture.convert("RGBA" if _transparent(picture) else "RGB")
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode == "RGBA":
        opaque, alpha = _in_srgb(picture.convert("RGB"), profile), picture.getchannel("A")
        return Image.composite(opaque, Image.new("RGB", picture.size, (255, 255, 255)), alpha)
    return _in_srgb(picture, profile).convert("RGB")


def _transparent(picture: Image.Image) -> bool:
    return picture.mode != "P" or "transparency" in picture.info


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("pixels of floating point numbers, whose range is not known")
    clear: Any = picture.info.get("transparency")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        if isinstance(clear, tuple) and max(clear) > 255:  # the clear colour keeps 16 bits where the pixels have lost eight
            picture.info["transparency"] = tuple(value >> 8 for value in clear)
        return picture
    # convert() would clip 16-bit grey at 255 instead of scaling it
    grey = np.asarray(picture).astype(np.int64)
    levels = Image.fromarray((np.clip(grey, 0, 65535) // 257).astype(np.uint8))
    if isinstance(clear, int):
        alpha = Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8))
        return Image.merge("LA", (levels, alpha))
    return levels


def _in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    space = _SPACES.get(picture.mode)
    if not profile or space is None:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found: Any = source.profile
        if found.xcolor_space.strip() != space or "sRGB" in (found.profile_description or ""):
            return picture
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return picture
    return converted if isinstance(converted, Image.Image) else picture
