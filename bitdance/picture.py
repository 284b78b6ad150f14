"""Decoder output → pixels → PNG that says how it was made, and back from such a PNG to its settings."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lfq_tokenizer import limits
from lfq_tokenizer.files import whole_file
from lfq_tokenizer.json_file import parse_json

METADATA_KEY = "bitdance"
TEXT_KEY = "parameters"
_SHOWN_AS = {
    "steps": "Steps",
    "guidance": "Guidance",
    "seed": "Seed",
    "width": "Width",
    "height": "Height",
    "sampler": "Sampler",
    "model": "Model",
    "class_name": "Class",
}


def to_unit(images_B3HW: Tensor) -> Tensor:
    """Decoder output, about [-1,1] → float32 in [0,1], same shape."""
    return (images_B3HW.float() / 2 + 0.5).clamp(0, 1)


def to_uint8(images_B3HW: Tensor) -> Tensor:
    """Decoder output (B,3,H,W), about [-1,1] → (B,H,W,3) uint8: clamp(127.5·y + 128, 0, 255), truncated.

    Source: published pipeline.
    """
    return (127.5 * images_B3HW.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(images_B3HW: Tensor) -> list[Image.Image]:
    """Decoder output (B,3,H,W), about [-1,1] → B RGB pictures."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images_B3HW).cpu().numpy()]


def grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures side by side in reading order on white; cells have the size of the largest. `gap` in pixels.

    `columns` defaults to the smallest square that holds all. ValueError when there is no picture.
    """
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    if columns is not None and columns < 1:
        raise ValueError(f"columns = {columns}; a grid needs at least 1")
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """The prompt on its own lines, then one line "Steps: 50, Guidance: 7.5, Seed: 1, …" as other programs show it."""
    settings = ", ".join(f"{shown}: {metadata[key]}" for key, shown in _SHOWN_AS.items() if key in metadata)
    return "\n".join(part for part in (str(metadata.get("prompt", "")), settings) if part)


def write_png(picture: Image.Image, path: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG whole or not at all; `metadata` (JSON values) goes into the iTXt chunks `bitdance` and
    `parameters`."""
    with whole_file(path) as file:
        save_png(picture, file, metadata)


def save_png(picture: Image.Image, file: BinaryIO, metadata: Mapping[str, Any] | None = None) -> None:
    """The same into an open file, for instance one in memory."""
    info = PngInfo()
    if metadata is not None:
        info.add_itxt(METADATA_KEY, json.dumps(dict(metadata), ensure_ascii=True))
        info.add_itxt(TEXT_KEY, parameters_text(metadata).encode("utf-8", "backslashreplace").decode("utf-8"))
    picture.save(file, format="PNG", pnginfo=info)


def read_picture(path: Path | str) -> tuple[Image.Image, dict[str, Any]]:
    """An RGB picture of a file, and the settings in it, {} where there are none (as in a photograph).

    FileNotFoundError or ValueError name a file that is missing, broken, or larger than what is read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} {_absent(path)}; give a picture")
    if path.stat().st_size > limits.PICTURE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; pictures of up to {limits.PICTURE_BYTES:,} are read")
    with path.open("rb") as file:
        rgb = open_picture(file, str(path)).convert("RGB")
    try:
        return rgb, read_metadata(path)
    except ValueError:
        return rgb, {}


def open_picture(file: BinaryIO, name: str, pixels: int = limits.PICTURE_PIXELS) -> Image.Image:
    """The picture of an open file, upright, in the mode that it has there. ValueError calls it `name`: one that is broken, or has
    more than `pixels`, which its header says before a pixel is decoded."""
    try:
        with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as picture:
            if picture.width * picture.height > pixels:
                raise ValueError(f"{picture.width}×{picture.height} pixels; up to {pixels:,} are read")
            upright = ImageOps.exif_transpose(picture)
            upright.load()
            return upright
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a readable picture ({error})") from error


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The settings in a PNG written by `write_png`. The pixels are not decoded.

    FileNotFoundError when there is no file, ValueError when it is no PNG or holds no such settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} {_absent(path)}; give a PNG that `bitdance generate` wrote")
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            metadata = metadata_of(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable PNG ({error})") from error
    if metadata is None:
        raise ValueError(f"{path} holds no settings of this program (PNG text chunk {METADATA_KEY!r})")
    return metadata


def _absent(path: Path) -> str:
    return "is no file" if path.exists() else "does not exist"


def metadata_of(picture: Image.Image) -> dict[str, Any] | None:
    """The settings in an opened PNG that `write_png` wrote, None where there are none."""
    text = picture.info.get(METADATA_KEY)
    try:
        metadata = parse_json(text, METADATA_KEY, checked_later=True) if isinstance(text, str) else None
    except ValueError:
        return None
    return metadata if isinstance(metadata, dict) else None
