"""The training pictures of a tokenizer, as loader processes see them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.config import TrainingConfig
from stages.data.order import EpochOrder
from stages.data.shards import Sample, ShardDataset, ShardIndex
from stages.data.skipping import Skips
from stages.feed import MicroBatch


class TokenizerFeed:
    """See `stages.feed.Feed`. Mirror and crop are drawn for a batch: its pictures share one crop."""

    def __init__(self, config: TrainingConfig) -> None:
        self.mirror, self.crop = config.data.mirror, config.data.crop
        self.data = ShardDataset(ShardIndex.open(config.data.train, config.data.keep))
        self.length, self.hash = len(self.data), self.data.index.hash
        self.order = EpochOrder(self.length, config.run.seed)

    def batch(self, indices: range, generator: torch.Generator) -> MicroBatch:
        """The pictures of these indices, (B,3,H,W) float32 in [-1,1], mirrored and cropped."""
        skipped = Skips()
        samples = [self.data.take(self.order.at(index), skipped) for index in indices]
        images = self._augmented(as_images([picture_of(sample) for sample in samples]), generator)
        return MicroBatch(images, [sample.key for sample in samples], dict(skipped), named=skipped.names)

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.mirror:
            flipped = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        if crop := self.crop:
            H, W = images.shape[2:]
            if crop > min(H, W):
                raise ValueError(f"data.crop = {crop} is larger than the pictures ({H}×{W}); 0 switches cropping off")
            y, x = (int(torch.randint(side - crop + 1, (), generator=generator)) for side in (H, W))
            images = images[:, :, y : y + crop, x : x + crop]
        return images.contiguous(memory_format=torch.channels_last)


def as_images(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size → (B,3,H,W) float32 in [-1,1], channels last in memory (the fastest layout here)."""
    sizes = {p.size for p in pictures}
    if len(sizes) > 1:
        raise ValueError(f"pictures of one batch have sizes {sorted(sizes)}; pack them with one --size")
    array_BHW3 = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures]))
    return (array_BHW3.float() / 127.5 - 1).permute(0, 3, 1, 2)


def picture_of(sample: Sample) -> Image.Image:
    """The picture of a sample; ValueError where it holds bits alone."""
    if sample.picture is None:
        raise ValueError(f"sample {sample.key} holds bits and no picture; a tokenizer trains on shards of pictures")
    return sample.picture
