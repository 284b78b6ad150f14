"""The captions of training pictures, and their features, which a frozen text encoder gives.

T text tokens of a caption, C features of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdance.networks.text_encoder import PromptReader, TextEncoder
from stages.data.shards import Sample

REMEMBERED = 20_000  # captions whose features are kept; those of the bundled pictures take 300 MB


@dataclass(frozen=True)
class CaptionBatch:
    """The token ids of each picture's caption; they are read one by one, so they stay lists."""

    ids: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device | str) -> "CaptionBatch":
        """Itself: ids go to the device when they are encoded."""
        return self


@dataclass(frozen=True)
class Captions:
    """See `pictures.feed.Conditions`. One of a sample's captions is drawn; a share `drop` of them is left out in training."""

    reader: PromptReader
    most: int
    drop: float

    def of(self, sample: Sample, source: torch.Generator | None) -> tuple[int, ...]:
        if not sample.captions:
            raise ValueError("it has no caption; give shards with captions, or leave text_encoder out of the config, for classes")
        caption = sample.captions[0]
        if source is not None:
            caption = sample.captions[int(torch.randint(len(sample.captions), (), generator=source))]
            if float(torch.rand((), generator=source)) < self.drop:
                caption = ""
        return tuple(self.reader.ids(caption)[: self.most])

    def joined(self, conditions: Sequence[tuple[int, ...]]) -> CaptionBatch:
        return CaptionBatch(tuple(conditions))


class CaptionFeatures:
    """Token ids of captions → features (T,C) of each, float32. Captions that come again are encoded once, as far as they fit."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, encoder: TextEncoder, ids: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
        if len(self._known) + len(ids) > REMEMBERED:
            self._known.clear()
        encoder.to(device)
        for caption in ids:
            if caption not in self._known:
                with torch.autocast(device.type, enabled=False):
                    self._known[caption] = encoder.features(caption).float()
        return [self._known[caption] for caption in ids]
