"""Pictures of any size through a tokenizer: padded to whole tokens, batched by size, cropped back.

A picture whose side is no multiple of the downsampling is padded at the right and the bottom by repeating its edge. Its true size
goes into the sample's attributes as `picture_size = [width, height]`, and decoding crops back to it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stages.data.sample import Skipped
from stages.data.shards import Sample
from stages.recipes.tokenizer.feed import as_images

SIZE_ATTRIBUTE = "picture_size"
WINDOW_PIXELS = 2**24  # pictures held while they wait for others of their size
WINDOW_SAMPLES = 1024
BATCH_PIXELS = 2**20  # in one batch of several pictures

T = TypeVar("T")


def grid_size(size: tuple[int, int], downsampling: int) -> tuple[int, int]:
    """(width, height) in pixels → (h, w) in tokens, the last ones perhaps partly filled."""
    return -(-size[1] // downsampling), -(-size[0] // downsampling)


def padded_images(pictures: Sequence[Image.Image], downsampling: int) -> Tensor:
    """RGB pictures that fill one grid size → (B,3,H,W) in [-1,1], padded at the right and the bottom by repeating the edge."""
    images = []
    for picture in pictures:
        h, w = grid_size(picture.size, downsampling)
        missing = (0, w * downsampling - picture.width, 0, h * downsampling - picture.height)
        image = as_images([picture])
        images.append(F.pad(image, missing, mode="replicate") if any(missing) else image)
    return torch.cat(images)


def with_size(attributes: dict[str, Any], size: tuple[int, int], downsampling: int) -> dict[str, Any]:
    """The attributes of an encoded sample: with its true size where that is not the grid's."""
    whole = not (size[0] % downsampling or size[1] % downsampling)
    return attributes if whole and SIZE_ATTRIBUTE not in attributes else {**attributes, SIZE_ATTRIBUTE: list(size)}


def true_size(sample: Sample, downsampling: int) -> tuple[int, int]:
    """(width, height) of the picture that a sample's bits decode to. ValueError when the attribute does not fit the grid."""
    assert sample.bits_Chw is not None
    _, h, w = sample.bits_Chw.shape
    size = sample.attributes.get(SIZE_ATTRIBUTE, [w * downsampling, h * downsampling])
    plain = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not plain or grid_size((size[0], size[1]), downsampling) != (h, w):
        raise ValueError(
            f"sample {sample.key}: {SIZE_ATTRIBUTE} = {size} does not fit its grid of {h}×{w} tokens of {downsampling} pixels; "
            "decode with the tokenizer that encoded it"
        )
    return size[0], size[1]


def by_size(
    items: Iterable[Sample | Skipped],
    grid: Callable[[Sample], tuple[int, int]],
    run: Callable[[list[Sample]], Sequence[T]],
    batch_size: int,
    token_pixels: int,
) -> Iterator[tuple[Sample, T] | Skipped]:
    """Every sample with its result of `run`, in order; `run` gets up to `batch_size` samples of one grid size, and fewer of large
    ones (`token_pixels` per token). What waits is bounded by WINDOW_PIXELS."""
    window: list[Sample | Skipped] = []
    pixels = 0
    for item in items:
        window.append(item)
        if isinstance(item, Sample):
            h, w = grid(item)
            pixels += h * w * token_pixels
        if pixels >= WINDOW_PIXELS or len(window) >= WINDOW_SAMPLES:
            yield from _run_window(window, grid, run, batch_size, token_pixels)
            window, pixels = [], 0
    yield from _run_window(window, grid, run, batch_size, token_pixels)


def _run_window(
    window: list[Sample | Skipped],
    grid: Callable[[Sample], tuple[int, int]],
    run: Callable[[list[Sample]], Sequence[T]],
    batch_size: int,
    token_pixels: int,
) -> Iterator[tuple[Sample, T] | Skipped]:
    groups: dict[tuple[int, int], list[int]] = {}
    for place, item in enumerate(window):
        if isinstance(item, Sample):
            groups.setdefault(grid(item), []).append(place)
    results: dict[int, T] = {}
    for (h, w), places in groups.items():
        size = max(1, min(batch_size, BATCH_PIXELS // (h * w * token_pixels)))
        for start in range(0, len(places), size):
            part = places[start : start + size]
            samples = [item for item in (window[place] for place in part) if isinstance(item, Sample)]
            results.update(zip(part, run(samples), strict=True))
    for place, item in enumerate(window):
        yield (item, results[place]) if isinstance(item, Sample) else item
