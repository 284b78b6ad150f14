"""The training samples of a class-conditional model, as loader processes see them: no weights.

Everything random about a sample follows from (seed, its index): neither its batch nor the number of processes changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.noise import ClassNoise
from lfq_tokenizer import LFQTokenizer
from stages.data.crops import square_crop
from stages.data.order import EpochOrder
from stages.data.shards import Sample, ShardDataset
from stages.data.skipping import Skips
from stages.feed import MicroBatch, sample_generator
from stages.recipes.class_patch.config import ClassTrainingConfig
from stages.recipes.class_patch.labels import Labels
from stages.recipes.tokenizer.coding import encode_pixels


@dataclass(frozen=True)
class ClassBatch:
    """`bits_BChw` in {-1,+1}, or pictures still to be encoded, `pixels_B3HW` uint8; one of them is given."""

    class_B: Tensor
    noise: ClassNoise
    bits_BChw: Tensor | None = None
    pixels_B3HW: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ClassBatch":
        """The batch on a device."""
        bits, pixels = (x if x is None else x.to(device, non_blocking=non_blocking) for x in (self.bits_BChw, self.pixels_B3HW))
        return ClassBatch(self.class_B.to(device), self.noise.to(device), bits, pixels)

    def encoded(self, tokenizer: LFQTokenizer) -> Tensor:
        """Bits (B,C,h,w), float32, on the device of the batch."""
        if self.bits_BChw is not None:
            return self.bits_BChw.float()
        assert self.pixels_B3HW is not None
        return encode_pixels(tokenizer, self.pixels_B3HW).float()


class ClassFeed:
    """The endless row of samples of one data set; a pure function of the config, the shards and the index."""

    def __init__(self, config: ClassTrainingConfig, data: ShardDataset, labels: Labels, shape: ClassPatchConfig) -> None:
        self.config, self.training, self.labels, self.shape = config, config.class_patch, labels, shape
        self.data = data
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
        noise = [ClassNoise.draw(1, self.shape, True, source) for source in sources]
        tokens = len(taken) * self.shape.num_tokens
        names = [sample.key for sample in taken]
        return MicroBatch(self._joined(taken, pictures, noise), names, dict(skipped), tokens, tokens, skipped.names)

    def plain(self, data: ShardDataset, numbers: Sequence[int]) -> ClassBatch:
        """Samples of a held-out set as they are judged: the middle square, no class dropped, no bit flipped, fixed noise."""
        taken = [data.take(number) for number in numbers]
        noise = [ClassNoise.draw(1, self.shape, False, sample_generator(0, number)) for number in numbers]
        return self._joined(taken, [self._tokens(sample) for sample in taken], noise)

    def _joined(self, taken: Sequence[Sample], tokens: Sequence[Tensor], noise: Sequence[ClassNoise]) -> ClassBatch:
        batch = ClassBatch(torch.tensor([self._class(sample) for sample in taken]), ClassNoise.joined(noise, self.shape))
        if len({token.dtype for token in tokens}) > 1:
            raise ValueError("some samples hold bits and others pictures; encode all of them, or none")
        joined = torch.stack(list(tokens))
        return replace(batch, pixels_B3HW=joined) if joined.dtype == torch.uint8 else replace(batch, bits_BChw=joined)

    def _class(self, sample: Sample) -> int:
        try:
            return self.labels.number(sample.attributes)
        except ValueError as error:
            raise ValueError(f"sample {sample.key}: {error}") from None

    def _tokens(self, sample: Sample, epoch: float = 0.0, source: torch.Generator | None = None) -> Tensor:
        """Bits (C,h,w) int8, or pixels (3,H,W) uint8: of a training sample where its `source` of random numbers is given."""
        if sample.bits_Chw is not None:
            wanted = (self.shape.latent_dim, self.shape.grid, self.shape.grid)
            if sample.bits_Chw.shape != wanted:
                raise ValueError(
                    f"sample {sample.key} holds bits of shape {tuple(sample.bits_Chw.shape)}, the model reads {wanted}; encode "
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
