"""A picture of any size → a square of the wished side, as class-conditional models are trained on.

Source: ADM (arXiv 2105.05233), preparation of ImageNet: halve by averaging while that is enough, then bicubic, then cut.
"""

import math

import torch
from PIL import Image


def square_crop(picture: Image.Image, size: int, share: float = 1.0, generator: torch.Generator | None = None) -> Image.Image:
    """RGB picture → RGB (size, size): the middle square or, with a generator, a random square of at least `share` of the shorter
    side, anywhere."""
    shorter = size
    if generator is not None:
        shorter = int(torch.randint(size, math.ceil(size / share) + 1, (), generator=generator))
    while min(picture.size) >= 2 * shorter:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    if generator is not None:
        left, top = (int(torch.randint(room + 1, (), generator=generator)) for room in (width - size, height - size))
    return picture.crop((left, top, left + size, top + size))
