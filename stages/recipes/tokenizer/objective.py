"""What a step of a tokenizer computes: pictures → bits → pictures, and the loss of `recipe.py`'s first lines.

Source: BitDance paper (arXiv 2602.14041), tokenizer section.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lfq_tokenizer import HierarchicalQuantizer, LFQTokenizer, LookupFreeQuantizer, TokenizerConfig
from lfq_tokenizer.entropy import without_autocast
from lfq_tokenizer.quantizer import NoQuantizer, QuantizerLosses
from lfq_tokenizer.scale_vae import ScaleTokenizer
from lfq_tokenizer.scales import ScaleCodes
from stages.config import TokenizerTraining
from stages.recipe import Losses
from stages.recipes.frozen import Frozen
from stages.recipes.tokenizer.adversary import Adversary
from stages.recipes.tokenizer.perceptual import LPIPS


class TokenizerObjective(nn.Module):
    """images (B,3,H,W) in [-1,1] → (loss, scalars, reconstructions without gradient)."""

    def __init__(
        self,
        tokenizer: LFQTokenizer | ScaleTokenizer,
        training: TokenizerTraining,
        compiled: bool = False,
        perceptual: LPIPS | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.training_config = tokenizer, training
        self.perceptual, self.adversary = Frozen(perceptual), Frozen(adversary)
        if training.freeze_encoder:
            for part in halves(tokenizer)["encoder"]:
                part.requires_grad_(False)
        if compiled:
            tokenizer.encoder.compile()
            tokenizer.decoder.compile()

    def forward(self, images_B3HW: Tensor, generator: torch.Generator, step: int) -> Losses:
        weights = self.training_config
        out_B3HW, q = self.reconstructed(images_B3HW, generator)
        out_B3HW = out_B3HW.float()
        difference = out_B3HW - images_B3HW
        l1, l2 = difference.abs().mean(), difference.square().mean()
        loss = weights.l1_weight * l1 + weights.l2_weight * l2
        psnr = -10 * torch.log10(difference.detach().square().mean(dim=(1, 2, 3)) / 4).mean()
        scalars = {"l1": l1, "psnr": psnr, **q.terms}
        if self.perceptual.module is not None:
            scalars["perceptual"] = self.perceptual.module.to(out_B3HW.device)(out_B3HW, images_B3HW).mean()
            loss = loss + weights.perceptual_weight * scalars["perceptual"]
        if self.adversary.module is not None and step >= weights.adversary.start:
            scalars["adversarial"] = self.adversary.module.deceive(out_B3HW)
            loss = loss + weights.adversary.weight * scalars["adversarial"]
        if not weights.freeze_encoder:
            loss = loss + weights.entropy_weight * q.entropy + weights.commitment_weight * q.commitment
        return loss, {k: v.detach() for k, v in scalars.items()}, out_B3HW.detach()

    def reconstructed(self, images_B3HW: Tensor, generator: torch.Generator) -> tuple[Tensor, QuantizerLosses]:
        """Through encoder, quantiser and decoder, not clamped; and the quantiser's terms."""
        raise NotImplementedError


class BitObjective(TokenizerObjective):
    """Of a tokenizer with one grid of bits."""

    tokenizer: LFQTokenizer

    def __init__(self, tokenizer: LFQTokenizer, training: TokenizerTraining, *rest: Any, **named: Any) -> None:
        super().__init__(tokenizer, training, *rest, **named)
        self.quantizer = quantizer_of(tokenizer.config, training)

    def reconstructed(self, images_B3HW: Tensor, generator: torch.Generator) -> tuple[Tensor, QuantizerLosses]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training_config.freeze_encoder):
            bits_BChw, q = self.quantizer(self.tokenizer.encoder(images_B3HW))
        noise = None
        if self.tokenizer.config.gan_decoder:
            noise = torch.randn(bits_BChw.shape, generator=generator).to(bits_BChw)
        return self.tokenizer.decoder(bits_BChw, noise), q


class ScaleObjective(TokenizerObjective):
    """Of a tokenizer with bits or codes at every scale.

    Bits: a scale is left out of a step with the probability `scale_dropout`, the last never. Codes: one that nothing used for
    `idle_steps` steps begins anew as a place that a picture of the step needed.
    Source: Infinity paper (arXiv 2412.04431) for the dropout. # OURS: idle codes; how VAR's were kept in use is not published.
    """

    tokenizer: ScaleTokenizer
    idle_V: Tensor

    def __init__(self, tokenizer: ScaleTokenizer, training: TokenizerTraining, *rest: Any, **named: Any) -> None:
        super().__init__(tokenizer, training, *rest, **named)
        codes = tokenizer.config.quantizer == "codes"
        self._revives = codes and training.idle_steps > 0 and not training.freeze_encoder
        self.register_buffer("idle_V", torch.full((tokenizer.config.codes,), training.idle_steps))

    def reconstructed(self, images_B3HW: Tensor, generator: torch.Generator) -> tuple[Tensor, QuantizerLosses]:
        tokenizer, sides, dropout = self.tokenizer, self.tokenizer.config.sides, self.training_config.scale_dropout
        if dropout and self.training:
            kept = [*(torch.rand(len(sides) - 1, generator=generator) >= dropout).tolist(), True]
            sides = tuple(side for side, keep in zip(sides, kept, strict=True) if keep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training_config.freeze_encoder):
            latents_BZhw = tokenizer.latents(images_B3HW)
            with without_autocast(latents_BZhw.device):
                if self._revives and self.training:
                    assert isinstance(tokenizer.quantize, ScaleCodes)
                    self._revive(tokenizer.quantize, latents_BZhw.detach().float(), generator)
                sum_BZhw, q = tokenizer.quantize(latents_BZhw, sides)
        return tokenizer.decoder(tokenizer.post_quant_conv(sum_BZhw)), q

    @torch.no_grad()
    def _revive(self, codes: ScaleCodes, latents_BZhw: Tensor, generator: torch.Generator) -> None:
        tokens = codes.encode(latents_BZhw, self.tokenizer.config.sides)
        used_V = torch.bincount(torch.cat([one.flatten() for one in tokens]), minlength=len(self.idle_V))
        needed_NZ = codes.lacking(latents_BZhw, tokens, self.tokenizer.config.sides)
        fresh_VZ = needed_NZ[torch.randint(len(needed_NZ), (len(self.idle_V),), generator=generator).to(needed_NZ.device)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(used_V)
            dist.broadcast(fresh_VZ, 0)
        self.idle_V = torch.where(used_V > 0, 0, self.idle_V + 1)
        dead_V = self.idle_V > self.training_config.idle_steps
        codes.embedding.weight[dead_V] = fresh_VZ[dead_V]
        self.idle_V[dead_V] = 0


def objective_of(
    tokenizer: LFQTokenizer | ScaleTokenizer, training: TokenizerTraining, *rest: Any, **named: Any
) -> TokenizerObjective:
    """Its objective; `rest` and `named` as of `TokenizerObjective`."""
    if isinstance(tokenizer, ScaleTokenizer):
        return ScaleObjective(tokenizer, training, *rest, **named)
    return BitObjective(tokenizer, training, *rest, **named)


def halves(tokenizer: LFQTokenizer | ScaleTokenizer) -> dict[str, list[nn.Module]]:
    """What turns pictures into bits or codes, and what turns those into pictures."""
    if isinstance(tokenizer, ScaleTokenizer):
        encoder = [tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize]
        return {"encoder": encoder, "decoder": [tokenizer.post_quant_conv, tokenizer.decoder]}
    return {"encoder": [tokenizer.encoder], "decoder": [tokenizer.decoder]}


def quantizer_of(config: TokenizerConfig, training: TokenizerTraining) -> nn.Module:
    """Latents (B,C,h,w) → what the decoder reads, and `QuantizerLosses`."""
    if config.quantizer == "hbq":
        return HierarchicalQuantizer(config.z_channels, config.rounds)
    if config.quantizer == "none":
        return NoQuantizer()
    return LookupFreeQuantizer(config.z_channels, training.groups, training.temperature, training.pool_groups)
