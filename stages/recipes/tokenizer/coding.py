"""Pictures to bits and bits to pictures with a trained tokenizer; a generator that trains from bits needs no encoder any more."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from bitdance.picture import to_pil, write_png
from lfq_tokenizer import any_tokenizer
from lfq_tokenizer.any_tokenizer import BitTokenizer, PictureTokenizer
from lfq_tokenizer.folder import WEIGHTS_FILE
from lfq_tokenizer.scale_vae import ScaleTokenizer
from lfq_tokenizer.scales import squares
from stages.data.bits import pack_bits
from stages.data.pack import PackOptions, pack
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.shards import Sample
from stages.data.skipping import name_skipped
from stages.engine.checkpoint import model_folder
from stages.recipes.tokenizer.any_size import by_size, grid_size, padded_images, true_size, with_size
from stages.recipes.tokenizer.input import TokenizerInput, safe_key

BATCH_SIZE = 16


def load_any(place: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PictureTokenizer:
    """Of a model folder, a run, a checkpoint or "demo". ValueError where a weight is no number."""
    folder = model_folder(place)
    tokenizer = any_tokenizer.load_tokenizer(folder)
    check_finite(tokenizer, folder / WEIGHTS_FILE)
    return tokenizer.to(device=device, dtype=dtype).eval()


def load_tokenizer(place: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> BitTokenizer:
    """The same of one that makes a single grid of bits; ValueError for another."""
    tokenizer = load_any(place, device, dtype)
    if isinstance(tokenizer, ScaleTokenizer):
        raise ValueError(f"{place} holds a tokenizer of scales; this needs one that makes a single grid of bits")
    any_tokenizer.check_makes_bits(tokenizer.config, str(place))
    return tokenizer


def with_sides(tokenizer: PictureTokenizer, sides: Sequence[int] | None) -> PictureTokenizer:
    """A tokenizer of scales with these. ValueError where another one is given some, and where it would have none."""
    if sides and not isinstance(tokenizer, ScaleTokenizer):
        raise ValueError(f"--sides is for a tokenizer of scales; this one makes {tokenizer.config.token}")
    if isinstance(tokenizer, ScaleTokenizer):
        if sides:
            tokenizer.config = replace(tokenizer.config, sides=tuple(squares(list(sides))))
        if not tokenizer.config.sides:
            raise ValueError("the tokenizer does not say its scales; say them, for example --sides 1 2 3 4 5 6 8 10 13 16 (VAR)")
    return tokenizer


def check_finite(tokenizer: PictureTokenizer, source: str | Path) -> None:
    """ValueError names up to ten tensors that hold NaN or an infinity."""
    broken = [name for name, tensor in tokenizer.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        more = f" and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(f"{source}: {', '.join(broken[:10])}{more} hold NaN or infinity; export or download it again")


def encode_pictures(tokenizer: BitTokenizer, images_B3HW: Tensor) -> Tensor:
    """images in [-1,1], of any device and dtype → bits (B,C,h,w) on the tokenizer's."""
    with torch.no_grad():
        return tokenizer.encode(images_B3HW.to(next(tokenizer.parameters())))


def encode_pixels(tokenizer: BitTokenizer, pixels_B3HW: Tensor) -> Tensor:
    """uint8 pixels → bits (B,C,h,w) in the tokenizer's dtype, channels last in memory (the fastest layout)."""
    images_B3HW = pixels_B3HW.to(next(tokenizer.parameters()).dtype) / 127.5 - 1
    return encode_pictures(tokenizer, images_B3HW.contiguous(memory_format=torch.channels_last))


def decode_pictures(tokenizer: BitTokenizer, bits_BChw: Tensor, seed: int = 0) -> Tensor:
    """bits (B,C,h,w) → images (B,3,H,W) float32 on the tokenizer's device. The noise of a generative decoder comes from one
    generator per picture, seeded with `seed`, so that a picture depends on its bits and the seed alone. ValueError for NaN.
    """
    bits_BChw = bits_BChw.to(next(tokenizer.parameters()))
    with torch.no_grad():
        if tokenizer.config.gan_decoder:
            # one by one: `decode` draws from one generator for a whole batch
            out = torch.cat([tokenizer.decode(bits[None], torch.Generator().manual_seed(seed)) for bits in bits_BChw])
        else:
            out = tokenizer.decode(bits_BChw)
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"the decoder gives NaN or infinity in {out.dtype}; use --dtype float32, or check the weights")
    return out.float()


@dataclass
class EncodedInput:
    """A `PictureSource` whose members are `.bits` instead of the pictures; captions and attributes stay. `mirror`: each picture
    and its mirror image, under the key KEY-mirrored."""

    tokenizer: BitTokenizer
    source: TokenizerInput
    batch_size: int = BATCH_SIZE
    mirror: bool = False
    expected: int = field(init=False)

    def __post_init__(self) -> None:
        self.expected = len(self.source) * (1 + self.mirror)
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        s = self.tokenizer.downsampling

        def run(samples: list[Sample]) -> list[bytes]:
            pictures = [sample.picture for sample in samples if sample.picture is not None]
            return [pack_bits(bits_Chw) for bits_Chw in encode_pictures(self.tokenizer, padded_images(pictures, s))]

        samples = self.source.samples(lambda sample: unfit_picture(sample, s))
        samples = _with_mirrored(samples) if self.mirror else samples
        for item in by_size(samples, lambda sample: picture_grid(sample, s), run, self.batch_size, s * s):
            if isinstance(item, Skipped):
                yield item
                continue
            sample, bits = item
            assert sample.picture is not None
            self._digest.update(sample.key.encode() + bits)
            attributes = with_size(sample.attributes, sample.picture.size, s)
            yield CaptionedPicture(safe_key(sample.key), sample.picture, sample.captions, attributes, encoded=bits, ending="bits")

    def describe(self) -> dict[str, Any]:
        encoder = {"sha256": weights_hash(self.tokenizer.encoder), "dtype": str(next(self.tokenizer.parameters()).dtype)}
        config = self.tokenizer.config.to_published()
        return {"name": "encoded", "sha256": self._digest.hexdigest(), "tokenizer": config, "encoder": encoder}


def _with_mirrored(samples: Iterator[Sample | Skipped]) -> Iterator[Sample | Skipped]:
    for sample in samples:
        yield sample
        if isinstance(sample, Sample) and sample.picture is not None:
            yield replace(sample, key=f"{sample.key}-mirrored", picture=ImageOps.mirror(sample.picture))


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names and values. Of an encoder: the bits follow from it alone, whatever decoder is trained later."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unfit_picture(sample: Sample, downsampling: int) -> str:
    """Why a sample cannot go through encoder and decoder, or ""."""
    if sample.picture is None:
        return "holds bits already"
    h, w = picture_grid(sample, downsampling)
    return "smaller than two tokens" if h * w < 2 else ""


def picture_grid(sample: Sample, downsampling: int) -> tuple[int, int]:
    """(h, w) in tokens of a sample that holds a picture."""
    assert sample.picture is not None
    return grid_size(sample.picture.size, downsampling)


def encode_input(
    tokenizer: BitTokenizer,
    source: TokenizerInput,
    out: Path,
    options: PackOptions,
    batch_size: int = BATCH_SIZE,
    mirror: bool = False,
) -> dict[str, Any]:
    """Write the bits of every picture (`mirror`: and of its mirror image) to the new folder of shards `out`; returns what its
    `pack.json` holds.

    What cannot be read, holds bits already, or is smaller than two tokens is skipped and counted by reason, up to
    `options.max_bad`. ValueError where the encoder gives a NaN; then nothing is written.
    """
    return pack(EncodedInput(tokenizer, source, batch_size, mirror), out, options)


def decode_input(
    tokenizer: BitTokenizer, source: TokenizerInput, out: Path, seed: int = 0, batch_size: int = BATCH_SIZE
) -> tuple[int, Counter[str]]:
    """Write `KEY.png` for every sample of shards of bits into the folder `out`, in its true size; returns their number, and what
    was skipped by reason. Pictures that exist are replaced. ValueError for pictures and for bits that do not fit the tokenizer.
    """
    s, bits = tokenizer.downsampling, tokenizer.config.bits

    def usable(sample: Sample) -> str:
        if sample.bits_Chw is None:
            raise ValueError(f"sample {sample.key} holds a picture and no bits; encode it first")
        found, h, w = sample.bits_Chw.shape
        if found != bits:
            raise ValueError(f"sample {sample.key} has {found} bits per token, the model {bits}; take the one that made them")
        true_size(sample, s)
        return "fewer than two tokens" if h * w < 2 else ""

    def grid(sample: Sample) -> tuple[int, int]:
        assert sample.bits_Chw is not None
        return sample.bits_Chw.shape[1], sample.bits_Chw.shape[2]

    def run(samples: list[Sample]) -> list[str]:
        bits_BChw = torch.stack([sample.bits_Chw for sample in samples if sample.bits_Chw is not None])
        for sample, picture in zip(samples, to_pil(decode_pictures(tokenizer, bits_BChw, seed)), strict=True):
            write_png(picture.crop((0, 0, *true_size(sample, s))), out / f"{safe_key(sample.key)}.png")
        return [sample.key for sample in samples]

    out.mkdir(parents=True, exist_ok=True)
    skipped: Counter[str] = Counter()
    done = 0
    with tqdm(total=len(source), disable=None, unit="picture") as bar:
        for item in by_size(_unique(source.samples(usable)), grid, run, batch_size, s * s):
            if isinstance(item, Skipped):
                skipped[item.reason] += 1
                name_skipped({item.name: item.why or item.reason})
            else:
                done += 1
            bar.update()
    return done, skipped


def _unique(items: Iterator[Sample | Skipped]) -> Iterator[Sample | Skipped]:
    """Two samples of one key would become one file."""
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Sample) and item.key in seen:
            yield Skipped(item.key, "duplicate key")
            continue
        if isinstance(item, Sample):
            seen.add(item.key)
        yield item
