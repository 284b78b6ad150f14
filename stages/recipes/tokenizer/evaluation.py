"""How good a tokenizer is on a user's own pictures, of any sizes and any number: `bitdance tokenizer eval`."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from bitdance.picture import grid, to_pil
from lfq_tokenizer.any_tokenizer import PictureTokenizer
from lfq_tokenizer.scale_vae import ScaleTokenizer
from stages.data.folder import fit
from stages.data.sample import Skipped
from stages.data.shards import Sample
from stages.data.skipping import name_skipped
from stages.measure.frechet import FrechetFeatures
from stages.measure.reconstruction import Reconstruction, round_trip
from stages.recipes.tokenizer.any_size import by_size, padded_images
from stages.recipes.tokenizer.coding import BATCH_SIZE, decode_pictures, encode_pictures, picture_grid, unfit_picture
from stages.recipes.tokenizer.input import TokenizerInput
from stages.recipes.tokenizer.perceptual import LPIPS

SHOWN, COLUMNS, LARGEST_SHOWN = 24, 8, 512  # pictures, and pixels of a side, of the side-by-side picture


class Evaluation:
    """`run()` goes over the input once; `notes` and `skipped` (by reason) belong beside its figures.

    size: take the middle square of every picture, resized to this side, as published figures do; 0 measures pictures as they are
    (a tokenizer of scales: squares of the size of its last scale).
    What pads a picture to whole tokens is not measured. perceptual, features: what `Reconstruction` takes.
    """

    def __init__(
        self,
        tokenizer: PictureTokenizer,
        source: TokenizerInput,
        perceptual: LPIPS | None = None,
        features: FrechetFeatures | None = None,
        size: int = 0,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        s = tokenizer.downsampling
        if isinstance(tokenizer, ScaleTokenizer):
            size = size or s * tokenizer.config.sides[-1][0]
            if (size // s, size // s) != tokenizer.config.sides[-1]:
                last = "×".join(str(s * side) for side in tokenizer.config.sides[-1])
                raise ValueError(f"--size {size}: the last scale of this tokenizer has {last} pixels; leave it out")
        if size and (size < 2 * s or size % s):
            raise ValueError(f"--size {size}: give a multiple of {s} from {2 * s} on, or leave it out")
        self.tokenizer, self.source, self.size, self.seed, self.batch_size = tokenizer, source, size, seed, batch_size
        self.measure = Reconstruction(tokenizer.config.bits, perceptual, features)
        self.device = next(tokenizer.parameters()).device
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self._pairs: list[tuple[Image.Image, Image.Image]] = []
        self._shown: set[str] = set()
        self._seconds = 0.0

    def run(self) -> dict[str, float]:
        """What `Reconstruction.result` names, and pictures_per_second: encoding and decoding, without reading and measuring.

        ValueError when no picture can be used.
        """
        s = self.tokenizer.downsampling
        with tqdm(total=len(self.source), disable=None, unit="picture") as bar:
            for item in by_size(self._items(), lambda sample: picture_grid(sample, s), self._measured, self.batch_size, s * s):
                if isinstance(item, Skipped):
                    self.skipped[item.reason] += 1
                    name_skipped({item.name: item.why or item.reason})
                elif item[1] is not None:
                    self._pairs.append(item[1])
                bar.update()
        if not self.measure.pictures:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
            raise ValueError(f"no usable picture ({reasons}); evaluate on the pictures that bits were encoded from")
        self.notes = self.measure.notes()
        return {**self.measure.result(), "pictures_per_second": self.measure.pictures / self._seconds}

    def side_by_side(self) -> Image.Image:
        """Pictures from all over the input in rows of 8, at most 24, their reconstructions underneath; large ones are shrunk to
        512 pixels. Beyond the first, rows that are not full are left out."""
        columns = min(COLUMNS, len(self._pairs))
        cells: list[Image.Image] = []
        for start in range(0, len(self._pairs) - columns + 1, columns):
            for which in (0, 1):
                cells += [pair[which] for pair in self._pairs[start : start + columns]]
        return grid(cells, columns, gap=0)

    def _items(self) -> Iterator[Sample | Skipped]:
        """The samples, of which evenly spread ones are noted for the side-by-side picture."""
        stride = max(1, len(self.source) // SHOWN)
        items = self.source.samples(lambda sample: unfit_picture(sample, self.tokenizer.downsampling))
        for number, item in enumerate(items):
            if isinstance(item, Sample) and item.picture is not None:
                if number % stride == 0 and len(self._shown) < SHOWN:
                    self._shown.add(item.key)
                if self.size:
                    item = replace(item, picture=fit(item.picture, self.size, "crop"))
            yield item

    def _measured(self, samples: list[Sample]) -> Sequence[tuple[Image.Image, Image.Image] | None]:
        pictures = [sample.picture for sample in samples if sample.picture is not None]
        images_B3HW = padded_images(pictures, self.tokenizer.downsampling).to(self.device)
        start = self._clock()
        if isinstance(self.tokenizer, ScaleTokenizer):
            out_B3HW, bits_BChw = round_trip(self.tokenizer, images_B3HW.to(next(self.tokenizer.parameters())))
            out_B3HW = out_B3HW.float()
        else:
            bits_BChw = encode_pictures(self.tokenizer, images_B3HW)
            out_B3HW = decode_pictures(self.tokenizer, bits_BChw, self.seed)
        self._seconds += self._clock() - start
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(pictures):
            sizes.setdefault(picture.size, []).append(i)
        for (width, height), places in sizes.items():
            crop = (places, slice(None), slice(height), slice(width))
            self.measure.add(images_B3HW[crop], out_B3HW[crop], bits_BChw[places] if self.measure.bits else None)
        pairs: list[tuple[Image.Image, Image.Image] | None] = []
        for sample, picture, out in zip(samples, pictures, out_B3HW, strict=True):
            after = to_pil(out[None, :, : picture.height, : picture.width])[0] if sample.key in self._shown else None
            pairs.append((_shrunk(picture), _shrunk(after)) if after is not None else None)
        return pairs

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _shrunk(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((LARGEST_SHOWN, LARGEST_SHOWN), Image.Resampling.LANCZOS)
    return small


def check_picture_path(path: Path) -> None:
    """Before a long run: ValueError for an ending that names no picture format, FileNotFoundError without the folder."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--picture {path}: the ending names no picture format; end it in .png, .jpg or .webp")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--picture {path}: the folder {path.parent} does not exist")
