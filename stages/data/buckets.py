"""Buckets: the sizes a model learns, by resolution and aspect ratio, and which of them a picture is brought to.

A resolution R stands for all sizes of about R × R pixels. Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from bitdance.folder.sizes import Size, SizeRule, sizes_at

NEAR = 1.25  # ready-made bits belong to a resolution when their side, √area, is within this factor of it


@dataclass(frozen=True)
class Buckets:
    """The sizes of each resolution. ValueError where a resolution has none that the rule allows."""

    rule: SizeRule
    resolutions: tuple[int, ...]

    def __post_init__(self) -> None:
        for resolution in self.resolutions:
            if not _sizes(self.rule, resolution):
                raise ValueError(
                    f"data.mix names {resolution} pixels, but no size of that area has sides that are multiples of "
                    f"{self.rule.unit} with a <|res_i|> token; choose another resolution"
                )

    def size_for(self, resolution: int, height: int, width: int) -> Size:
        """The size of `resolution` whose aspect ratio is nearest to that of a picture."""
        return nearest_aspect(_sizes(self.rule, resolution), height, width)

    def reach(self, height: int, width: int, enlarge: float) -> tuple[int, ...]:
        """Resolutions that a picture can be brought to by shrinking, or by enlarging at most by the factor `enlarge`."""
        sizes = {resolution: self.size_for(resolution, height, width) for resolution in self.resolutions}
        return tuple(r for r, (H, W) in sizes.items() if max(H / height, W / width) <= enlarge)

    def of_bits(self, height: int, width: int) -> tuple[int, ...]:
        """The one resolution that ready-made bits of a picture of this size belong to, or none."""
        if not self.rule.allows(height, width):
            return ()
        side = math.sqrt(height * width)
        nearest = min(self.resolutions, key=lambda r: abs(math.log(r / side)))
        return (nearest,) if max(nearest / side, side / nearest) <= NEAR else ()


@lru_cache(maxsize=64)
def _sizes(rule: SizeRule, resolution: int) -> tuple[Size, ...]:
    return tuple(sizes_at(rule, resolution))  # asked for every picture


def nearest_aspect(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The largest of the sizes whose aspect ratio is nearest to height : width."""
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] * width / (size[1] * height))), 6), -size[0] * size[1]))


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """Scale a picture until it covers `size`, then cut what is over equally from both sides."""
    height, width = size
    if picture.size == (width, height):
        return picture
    scale = max(height / picture.height, width / picture.width)
    covering = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    scaled = picture.resize(covering, Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))
