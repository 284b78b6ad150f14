"""Recipe 'tokenizer': pictures → bits → pictures.

    loss = l1·|y − x| + l2·(y − x)² + perceptual·LPIPS(y, x) + adversary·(−D(y))
         + entropy·(H(sample) − H(mean)) + commitment·|z − sg(bits)|²

With `model.quantizer = "hbq"` a latent is several bits; then there is no entropy term, and published training gives the
commitment no weight. With "multi_scale" there are bits or codes at every scale (scales.py). The discriminator D learns by its
own loss, with its own optimiser (adversary.py). With a frozen encoder
only the first line is left, and a generative decoder (`model.gan_decoder`) learns to use its noise: the second phase.
Source: BitDance paper (arXiv 2602.14041), tokenizer section.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from lfq_tokenizer import HierarchicalQuantizer, LFQTokenizer, LookupFreeQuantizer, TokenizerConfig
from lfq_tokenizer.any_tokenizer import PictureTokenizer, build_tokenizer, load_tokenizer
from lfq_tokenizer.entropy import without_autocast
from lfq_tokenizer.growth import grow_generative
from lfq_tokenizer.quantizer import QuantizerLosses
from lfq_tokenizer.scale_vae import ScaleTokenizer
from lfq_tokenizer.scales import ScaleCodes
from stages.config import OptimizerConfig, TokenizerTraining, TrainingConfig
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.measure.reconstruction import measure_tokenizer, side_by_side
from stages.recipe import Discriminator, Losses
from stages.recipes.frozen import Frozen
from stages.recipes.tokenizer.adversary import Adversary
from stages.recipes.tokenizer.feed import TokenizerFeed, as_images, picture_of
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
        self.register_buffer("idle_V", torch.full((tokenizer.config.codes,), training.idle_steps))

    def reconstructed(self, images_B3HW: Tensor, generator: torch.Generator) -> tuple[Tensor, QuantizerLosses]:
        tokenizer, sides, dropout = self.tokenizer, self.tokenizer.config.sides, self.training_config.scale_dropout
        if dropout and self.training:
            kept = [*(torch.rand(len(sides) - 1, generator=generator) >= dropout).tolist(), True]
            sides = tuple(side for side, keep in zip(sides, kept, strict=True) if keep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training_config.freeze_encoder):
            latents_BZhw = tokenizer.latents(images_B3HW)
            with without_autocast(latents_BZhw.device):
                if isinstance(tokenizer.quantize, ScaleCodes) and self.training and self.training_config.idle_steps:
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


def objective_of(tokenizer: LFQTokenizer | ScaleTokenizer, *rest: Any) -> TokenizerObjective:
    """Its objective; `rest` as of `TokenizerObjective`."""
    return ScaleObjective(tokenizer, *rest) if isinstance(tokenizer, ScaleTokenizer) else BitObjective(tokenizer, *rest)


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
    return LookupFreeQuantizer(config.z_channels, training.groups, training.temperature, training.pool_groups)


class TokenizerRecipe:
    """See `recipe.Recipe`."""

    flops, base = 0.0, ""

    def __init__(self, config: TrainingConfig) -> None:
        training = config.tokenizer
        self.config = config
        config.data.refuse("tokenizer", "sources", "mix", "row_tokens")
        self.feed = TokenizerFeed(config)
        self.heldout = ShardDataset(ShardIndex.open(config.data.heldout)) if config.data.heldout else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            tokenizer = build_tokenizer(training.model)
            assert isinstance(tokenizer, LFQTokenizer | ScaleTokenizer)
            adversary = Adversary(training.adversary) if training.adversary.weight else None
        if training.init:
            tokenizer.load_state_dict(_start(training).state_dict())
        elif training.freeze_encoder:
            raise ValueError("tokenizer.freeze_encoder trains a decoder for an encoder that exists; name it in tokenizer.init")
        perceptual = LPIPS.from_file(training.perceptual) if training.perceptual and training.perceptual_weight else None
        self.module = objective_of(tokenizer, training, config.run.compile, perceptual, adversary)
        self.discriminator = None
        if adversary is not None:
            optimizer = OptimizerConfig(
                lr=training.adversary.lr, betas=training.adversary.betas, eps=1e-8, warmup_steps=0, clip=config.optimizer.clip
            )
            self.discriminator = Discriminator(adversary, optimizer, training.adversary.start)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            name: [p for part in parts for p in part.parameters() if p.requires_grad]
            for name, parts in halves(_tokenizer(self.module)).items()
        }

    def validate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, TokenizerObjective)
        return measure_tokenizer(module.tokenizer, self._heldout_images(256, module), perceptual=module.perceptual.module)

    def sample(self, module: nn.Module) -> Image.Image:
        return side_by_side(_tokenizer(module), self._heldout_images(24, module))

    def save_model(self, module: nn.Module, folder: Path, step: int) -> None:
        _tokenizer(module).save_pretrained(folder)

    def _heldout_images(self, count: int, module: nn.Module) -> Tensor:
        """`count` held-out pictures on the module's device."""
        data = self.heldout or self.feed.data
        stride = max(1, len(data) // count)
        images = as_images([picture_of(data.take(i)) for i in range(0, len(data), stride)][:count])
        return images.to(next(module.parameters()).device)


def _tokenizer(module: nn.Module) -> LFQTokenizer | ScaleTokenizer:
    assert isinstance(module, TokenizerObjective)
    return module.tokenizer


def _start(training: TokenizerTraining) -> PictureTokenizer:
    """The tokenizer of `training.init`, its plain decoder grown where the config asks for a generative one."""
    start = load_tokenizer(model_folder(training.init)).float()
    if training.model.gan_decoder and isinstance(start, LFQTokenizer) and not start.config.gan_decoder:
        start = grow_generative(start)
    if start.config != training.model:
        raise ValueError(f"tokenizer.init {training.init} holds {start.config}, the config asks for {training.model}")
    return start
