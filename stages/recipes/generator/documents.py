"""Sample → example: its caption and the picture's bits (or its pixels, to be encoded on the training device), with all noise.

Everything random about an example follows from (seed, index): neither its batch nor the number of processes changes it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance.heads.diffusion.network import HeadConfig
from bitdance.sequence.batch import ImagePiece, TextPiece, TrainingBatch, build_batch
from bitdance.sequence.noise import ImageNoise
from bitdance.sequence.patches import PatchPlan, patch_side
from bitdance.sequence.prompt import SpecialTokens, conditional_ids, unconditional_ids
from lfq_tokenizer import LFQTokenizer
from stages.config import GeneratorTraining
from stages.data.buckets import Buckets, fit
from stages.data.mixture import SampleReference
from stages.data.shards import Sample, ShardDataset
from stages.recipes.tokenizer.coding import encode_pixels


@dataclass(frozen=True)
class Example:
    """One sample as pieces of a document: with its pixels (3,H,W) uint8 where the picture is still to be encoded, and its
    `targets`, what a teacher predicts of it."""

    name: str
    pieces: list[TextPiece | ImagePiece]
    pixels_3HW: Tensor | None
    targets: bytes | None = None


@dataclass
class GeneratorBatch:
    """A batch whose pictures may still be pixels: `pixels` of image number `k` of the batch, uint8 (3,H,W)."""

    sequence: TrainingBatch
    pixels: dict[int, Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "GeneratorBatch":
        pixels = {k: part.to(device, non_blocking=non_blocking) for k, part in self.pixels.items()}
        return GeneratorBatch(self.sequence.to(device, non_blocking=non_blocking), pixels)

    def pin_memory(self) -> "GeneratorBatch":
        return GeneratorBatch(self.sequence.pin_memory(), {k: part.pin_memory() for k, part in self.pixels.items()})

    @torch.no_grad()
    def encoded(self, tokenizer: LFQTokenizer, p: int) -> TrainingBatch:
        """The sequence with the bits of all pictures; pictures of one size are encoded together."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for k, pixels_3HW in self.pixels.items():
            by_size.setdefault(tuple(pixels_3HW.shape), []).append(k)
        for members in by_size.values():
            bits_BChw = encode_pixels(tokenizer, torch.stack([self.pixels[k] for k in members]))
            h, w = bits_BChw.shape[2:]
            plan = PatchPlan(h, w, p)
            for k, bits_NC in zip(members, plan.order(bits_BChw), strict=True):
                self.sequence.image_bits_NC[self.sequence.spans[k]] = bits_NC.float()
        return self.sequence


class Documents:
    """Makes examples, and batches of them, for one model; it holds no weights."""

    def __init__(
        self,
        text_tokenizer: Any,
        special: SpecialTokens,
        tokenizer: LFQTokenizer,
        head: HeadConfig,
        buckets: Buckets,
        training: GeneratorTraining,
        row_tokens: int,
        multiple_of: int,
    ) -> None:
        self.text_tokenizer, self.special, self.head, self.training = text_tokenizer, special, head, training
        self.buckets = buckets
        # how rows are packed
        self.packed = {"token_budget": row_tokens, "multiple_of": multiple_of} if row_tokens else {}
        self._bits, self._downsampling = tokenizer.config.bits, tokenizer.downsampling

    def example(
        self, data: ShardDataset, reference: SampleReference, generator: torch.Generator, skipped: Counter[str]
    ) -> Example:
        """A sample as training reads it: one of its captions, or none with probability `dropout`; some of its bits flipped."""
        sample = data.take(reference.number, skipped)
        drop, pick = torch.rand(2, generator=generator).tolist()
        caption = "" if drop < self.training.dropout else sample.captions[int(pick * len(sample.captions))]
        return self.with_noise(sample, reference.resolution, caption, self.training.flip_max, generator)

    def plain(self, data: ShardDataset, reference: SampleReference, generator: torch.Generator) -> Example:
        """A sample as validation reads it: its first caption, no bit flipped."""
        sample = data.take(reference.number)
        return self.with_noise(sample, reference.resolution, sample.captions[0], 0.0, generator)

    def batch(self, examples: Sequence[Example]) -> GeneratorBatch:
        """The examples in rows, in their order or packed."""
        documents = [example.pieces for example in examples]
        sequence = build_batch(documents, patch_side(self.head.parallel_num), self.special, **self.packed)
        return GeneratorBatch(sequence, {k: e.pixels_3HW for k, e in enumerate(examples) if e.pixels_3HW is not None})

    def with_noise(self, sample: Sample, resolution: int, caption: str, flip_max: float, generator: torch.Generator) -> Example:
        """A sample with a caption ("": none) and the noise of its loss, drawn from `generator`."""
        if caption:
            ids = conditional_ids(self.text_tokenizer, caption, self.training.max_text_tokens)
        else:
            ids = unconditional_ids(self.text_tokenizer)
        bits_Chw, pixels_3HW = self._picture(sample, resolution)
        noise = ImageNoise.draw(bits_Chw[0].numel(), self.head, flip_max, generator)
        pieces: list[TextPiece | ImagePiece] = [TextPiece(ids, predict=bool(caption)), ImagePiece(bits_Chw, noise=noise)]
        return Example(sample.key, pieces, pixels_3HW, sample.targets)

    def _picture(self, sample: Sample, resolution: int) -> tuple[Tensor, Tensor | None]:
        """Bits (C,h,w), or zeros in their place and the pixels that they will be made of."""
        if sample.bits_Chw is not None:
            if sample.bits_Chw.shape[0] != self._bits:
                raise ValueError(
                    f"sample {sample.key} holds {sample.bits_Chw.shape[0]} bits per token, the tokenizer makes {self._bits}; "
                    "encode the pictures again with this tokenizer"
                )
            return sample.bits_Chw, None
        picture = sample.picture
        assert picture is not None
        if resolution:
            picture = fit(picture, self.buckets.size_for(resolution, picture.height, picture.width))
        s = self._downsampling
        if picture.height % s or picture.width % s:
            raise ValueError(
                f"sample {sample.key} has {picture.height}×{picture.width} pixels, no multiple of {s}; give data.mix, "
                "or pack the pictures in a fitting size"
            )
        return torch.zeros(self._bits, picture.height // s, picture.width // s), _pixels(picture)


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).contiguous()
