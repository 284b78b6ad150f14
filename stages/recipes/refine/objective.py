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


class RefineObjective(PictureObjective):
    """See `PictureObjective`."""

    loss_name = "labels"

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
        features = self.features(self.text.module, ids, device)
        return self.model.prepare(pad_sequence(features, batch_first=True), [len(caption) for caption in ids])
