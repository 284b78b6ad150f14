"""Shards through a trained tokenizer: pictures to bits, bits to pictures, or pictures to figures.

A generator that trains from bits never runs the encoder again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bitdance.picture import to_pil, write_png
from lfq_tokenizer import LFQTokenizer
from stages.checkpoint import model_folder
from stages.data.bits import pack_bits
from stages.data.pack import PackOptions, pack
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.shards import ShardDataset, ShardIndex
from stages.measure.reconstruction import measure_tokenizer, side_by_side
from stages.tokenizer_recipe import as_images


class EncodedShards:
    """A source of samples whose member is `.bits` instead of the picture; captions and attributes stay."""

    def __init__(self, tokenizer: LFQTokenizer, data: ShardDataset) -> None:
        self.tokenizer, self.data, self.expected = tokenizer, data, len(data)

    @torch.no_grad()
    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        for index in range(len(self.data)):
            try:
                sample = self.data[index]
            except ValueError:
                yield Skipped(self.data.key(index), "cannot be read")
                continue
            if sample.picture is None:
                yield Skipped(sample.key, "holds bits already")
                continue
            bits_Chw = self.tokenizer.encode(as_images([sample.picture]))[0]
            yield CaptionedPicture(
                sample.key, sample.picture, sample.captions, sample.attributes, encoded=pack_bits(bits_Chw), ending="bits"
            )

    def describe(self) -> dict[str, Any]:
        config = self.tokenizer.config
        return {"name": "encoded", "shards": self.data.index.hash, "tokenizer": config.to_published()}


def load_tokenizer(folder: str | Path) -> LFQTokenizer:
    """Of a model folder, a run, a checkpoint or the bundled model, in float32."""
    return LFQTokenizer.from_pretrained(model_folder(folder)).float()


def encode_shards(model: str | Path, shards: Sequence[str], out: Path) -> int:
    """Write the bits of every picture to the new folder `out`; returns their number."""
    source = EncodedShards(load_tokenizer(model), ShardDataset(ShardIndex.open(list(shards))))
    return int(pack(source, out, PackOptions(progress=True))["samples"])


@torch.no_grad()
def decode_shards(model: str | Path, shards: Sequence[str], out: Path, seed: int = 0) -> int:
    """Write `KEY.png` for every sample of shards of bits into the folder `out`; returns their number.

    A generative decoder draws its noise from `seed`. Pictures that exist are replaced.
    """
    tokenizer, data = load_tokenizer(model), ShardDataset(ShardIndex.open(list(shards)))
    out.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(len(data)), disable=None, unit="picture"):
        sample = data[index]
        if sample.bits_Chw is None:
            raise ValueError(f"sample {sample.key} holds a picture and no bits; encode the shards first")
        image = tokenizer.decode(sample.bits_Chw[None].float(), torch.Generator().manual_seed(seed))
        write_png(to_pil(image)[0], out / f"{sample.key}.png")
    return len(data)


def evaluate_shards(model: str | Path, shards: Sequence[str], picture: Path | None = None) -> dict[str, float]:
    """`measure_tokenizer` over all pictures of the shards, which must have one size; optionally a picture of the first 24."""
    tokenizer, data = load_tokenizer(model), ShardDataset(ShardIndex.open(list(shards)))
    pictures = [sample.picture for sample in (data[i] for i in range(len(data))) if sample.picture is not None]
    if not pictures:
        raise ValueError("these shards hold bits and no pictures; evaluate on the shards they were encoded from")
    images = as_images(pictures)
    if picture is not None:
        side_by_side(tokenizer, images[:: max(1, len(images) // 24)][:24]).save(picture)
    return {"pictures": float(len(images)), **measure_tokenizer(tokenizer, images)}
