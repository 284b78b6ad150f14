"""What a step of a refinement model computes: batch → cross-entropy of all labels.

Source: GRN paper (arXiv 2604.13030), training objective.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bitdance.kinds.refine.config import TextRefineConfig
from bitdance.kinds.refine.model import label_losses
from stages.recipe import Losses
from stages.recipes.generator.objective import by_noise_level
from stages.recipes.pictures.feed import PictureBatch
from stages.recipes.pictures.recipe import PictureObjective

REMEMBERED = 20_000  # captions whose features are kept; those of the bundled pictures take 300 MB


class RefineObjective(PictureObjective):
    """See `PictureObjective`. Features of captions that come again are computed once, as far as they fit."""

    loss_name = "labels"
    _known: dict[tuple[int, ...], Tensor]

    def rows(self, batch: PictureBatch) -> Tensor:
        """Cross-entropy of every label (B,G,h,w)."""
        bits_BChw = batch.encoded(self.tokenizer.module)
        condition = batch.condition
        if isinstance(self.model.config, TextRefineConfig):
            condition = self._memory(condition.ids, bits_BChw.device)
        return label_losses(self.model, bits_BChw, condition, batch.noise)

    def forward(self, batch: PictureBatch, generator: torch.Generator, step: int) -> Losses:
        loss_BGhw = self.rows(batch)
        return loss_BGhw.mean(), by_noise_level("labels", loss_BGhw.flatten(1), batch.noise.time_B), None

    def _memory(self, ids: tuple[tuple[int, ...], ...], device: torch.device) -> object:
        known = self.__dict__.setdefault("_known", {})
        encoder = self.text.module.to(device)
        if len(known) + len(ids) > REMEMBERED:
            known.clear()
        for caption in ids:
            if caption not in known:
                with torch.autocast(device.type, enabled=False):
                    known[caption] = encoder.features(caption).float()
        features = [known[caption] for caption in ids]
        return self.model.prepare(pad_sequence(features, batch_first=True), [len(caption) for caption in ids])
