"""What a step of a next-scale model computes: batch → cross-entropy of every scale's tokens.

Sources: VAR paper (arXiv 2404.02905), Infinity paper (arXiv 2412.04431), training.
"""

import torch
from torch import Tensor

from bitdance.kinds.next_scale.model import scale_weights, token_losses
from bitdance.kinds.next_scale.network import Condition
from bitdance.networks.text_encoder import TextEncoder
from stages.recipe import Losses
from stages.recipes.next_scale.config import NextScaleTraining
from stages.recipes.pictures.feed import PictureBatch
from stages.recipes.pictures.recipe import PictureObjective


class NextScaleObjective(PictureObjective):
    """See `PictureObjective`."""

    loss_name = "tokens"

    def __init__(self, model: torch.nn.Module, tokenizer: object, text: TextEncoder | None, training: NextScaleTraining) -> None:
        super().__init__(model, tokenizer, text)
        self.smoothing, sides = training.smoothing, self.model.config.sides
        self.weights_L = scale_weights(sides, training.reweighted).float()
        self.lengths = [h * w for h, w in sides]

    def rows(self, batch: PictureBatch) -> Tensor:
        """Cross-entropy of every token (B,L), the mean over its bits."""
        assert batch.pixels_B3HW is not None
        pixels_B3HW, network, noise = batch.pixels_B3HW, self.model, batch.noise
        tokenizer = self.tokenizer.module.to(pixels_B3HW.device)
        with torch.no_grad(), torch.autocast(pixels_B3HW.device.type, enabled=False):
            latents_BZhw = tokenizer.latents(pixels_B3HW.float() / 127.5 - 1)
        losses = token_losses(
            network,
            tokenizer.quantize,
            latents_BZhw,
            self._condition(batch),
            network.config.sides,
            noise.flipped,
            noise.kept_D2B,
            self.smoothing if self.training else 0.0,
        )
        return losses.mean(dim=2) if losses.ndim == 3 else losses

    def forward(self, batch: PictureBatch, generator: torch.Generator, step: int) -> Losses:
        loss_BL = self.rows(batch)
        by_scale = loss_BL.mean(dim=0).detach().split(self.lengths)
        told = {f"tokens/scale_{k}": one.mean() for k, one in enumerate(by_scale, 1)}
        return (loss_BL * self.weights_L.to(loss_BL.device)).sum(dim=1).mean(), told, None

    def _condition(self, batch: PictureBatch) -> Condition:
        dropped_B, network = batch.noise.dropped_B, self.model
        if network.config.condition == "class":
            return network.of_classes(torch.where(dropped_B, network.null_class, batch.condition))
        features = self.features(self.text.module, batch.condition.ids, dropped_B.device)
        return network.of_text(
            [network.cfg_uncond[: len(one)] if drop else one for one, drop in zip(features, dropped_B.tolist(), strict=True)]
        )
