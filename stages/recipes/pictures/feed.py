"""The training samples of one network over a frozen tokenizer, as loader processes see them: no weights.

Everything random about a sample follows from (seed, its index): neither its batch nor the number of processes changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lfq_tokenizer.any_tokenizer import BitTokenizer
from stages.config import TrainingConfig
from stages.data.crops import square_crop
from stages.data.order import EpochOrder
from stages.data.shards import Sample, ShardDataset
from stages.data.skipping import Skips
from stages.feed import MicroBatch, sample_generator
from stages.recipes.pictures.config import PictureTraining
from stages.recipes.tokenizer.coding import encode_pixels


class Conditions(Protocol):
    """What pictures are made of, as a batch: class numbers, or captions."""

    def of(self, sample: Sample, source: torch.Generator | None) -> Any:
        """The condition of one sample; `source` draws what is random about it in training. ValueError says what it lacks."""
        ...

    def joined(self, conditions: Sequence[Any]) -> Any:
        """Those of a batch, with `.to(device)`."""
        ...


class Noise(Protocol):
    """How a model's random numbers are drawn and put together."""

    def draw(self, training: bool, source: torch.Generator) -> Any:
        """Those of one picture."""
        ...

    def joined(self, noise: Sequence[Any]) -> Any:
        """Those of a batch, with `.to(device)`."""
        ...


@dataclass(frozen=True)
class PictureBatch:
    """`bits_BChw` in {-1,+1}, or pictures still to be encoded, `pixels_B3HW` uint8; one of them is given."""

    condition: Any
    noise: Any
    bits_BChw: Tensor | None = None
    pixels_B3HW: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PictureBatch":
        """The batch on a device."""
        bits, pixels = (x if x is None else x.to(device, non_blocking=non_blocking) for x in (self.bits_BChw, self.pixels_B3HW))
        return PictureBatch(self.condition.to(device), self.noise.to(device), bits, pixels)

    def encoded(self, tokenizer: BitTokenizer) -> Tensor:
        """Bits (B,C,h,w), float32, on the device of the batch."""
        if self.bits_BChw is not None:
            return self.bits_BChw.float()
        assert self.pixels_B3HW is not None
        return encode_pixels(tokenizer.to(self.pixels_B3HW.device), self.pixels_B3HW).float()


class PictureFeed:
    """The endless row of samples of one data set; a pure function of the config, the shards and the index.

    `shape` of a picture's bits: (C, h, w).
    """

    def __init__(
        self,
        config: TrainingConfig,
        training: PictureTraining,
        data: ShardDataset,
        conditions: Conditions,
        noise: Noise,
        shape: tuple[int, int, int],
    ) -> None:
        self.config, self.training, self.data = config, training, data
        self.conditions, self.noise, self.shape = conditions, noise, shape
        self.length, self.hash = len(data), data.index.hash
        self.order = EpochOrder(self.length, config.run.seed)

    def batch(self, indices: range, generator: torch.Generator) -> MicroBatch:
        """The samples of these indices, with their noise."""
        skipped = Skips()
        taken = [self.data.take(self.order.at(index), skipped) for index in indices]
        sources = [sample_generator(self.config.run.seed, index) for index in indices]
        pictures = [
            self._tokens(sample, index / self.length, source)
            for sample, index, source in zip(taken, indices, sources, strict=True)
        ]
        noise = [self.noise.draw(True, source) for source in sources]
        tokens = len(taken) * self.shape[1] * self.shape[2]
        names = [sample.key for sample in taken]
        return MicroBatch(self._joined(taken, pictures, noise, sources), names, dict(skipped), tokens, tokens, skipped.names)

    def plain(self, data: ShardDataset, numbers: Sequence[int]) -> PictureBatch:
        """Samples of a held-out set as they are judged: the middle square, no condition dropped, no bit flipped, fixed noise."""
        taken = [data.take(number) for number in numbers]
        noise = [self.noise.draw(False, sample_generator(0, number)) for number in numbers]
        return self._joined(taken, [self._tokens(sample) for sample in taken], noise, [None] * len(taken))

    def _joined(
        self,
        taken: Sequence[Sample],
        tokens: Sequence[Tensor],
        noise: Sequence[Any],
        sources: Sequence[torch.Generator | None],
    ) -> PictureBatch:
        conditions = [self._condition(sample, source) for sample, source in zip(taken, sources, strict=True)]
        batch = PictureBatch(self.conditions.joined(conditions), self.noise.joined(noise))
        if len({token.dtype for token in tokens}) > 1:
            raise ValueError("some samples hold bits and others pictures; encode all of them, or none")
        joined = torch.stack(list(tokens))
        return replace(batch, pixels_B3HW=joined) if joined.dtype == torch.uint8 else replace(batch, bits_BChw=joined)

    def _condition(self, sample: Sample, source: torch.Generator | None) -> Any:
        try:
            return self.conditions.of(sample, source)
        except ValueError as error:
            raise ValueError(f"sample {sample.key}: {error}") from None

    def _tokens(self, sample: Sample, epoch: float = 0.0, source: torch.Generator | None = None) -> Tensor:
        """Bits (C,h,w) int8, or pixels (3,H,W) uint8: of a training sample where its `source` of random numbers is given."""
        if sample.bits_Chw is not None:
            if sample.bits_Chw.shape != self.shape:
                found = tuple(sample.bits_Chw.shape)
                raise ValueError(
                    f"sample {sample.key} holds bits of shape {found}, the model reads {self.shape}; encode "
                    f"pictures of {self.training.size}×{self.training.size} pixels with this tokenizer"
                )
            return sample.bits_Chw
        assert sample.picture is not None
        cropped = source if source is not None and self._crops(epoch, source) else None
        picture = square_crop(sample.picture.convert("RGB"), self.training.size, self.training.crop_share, cropped)
        pixels_HW3 = np.asarray(picture)
        if source is not None and self.config.data.mirror and float(torch.rand((), generator=source)) < 0.5:
            pixels_HW3 = pixels_HW3[:, ::-1]
        return torch.from_numpy(pixels_HW3.copy()).permute(2, 0, 1).contiguous()

    def _crops(self, epoch: float, source: torch.Generator) -> bool:
        """Whether a picture of this epoch is cropped at random."""
        if self.training.crop_share == 1:
            return False
        ratio = 1.0
        if self.training.crop_decay:
            start, end = self.training.crop_decay
            ratio = min(1.0, max(0.0, 1 - (int(epoch) - start) / (end - start)))
        return float(torch.rand((), generator=source)) < ratio
