"""Recipe 'tokenizer': pictures → bits → pictures.

    loss = l1·|y − x| + l2·(y − x)² + perceptual·LPIPS(y, x) + adversary·(−D(y))
         + entropy·(H(sample) − H(mean)) + commitment·|z − sg(bits)|²

With `model.quantizer = "hbq"` a latent is several bits; then there is no entropy term, and published training gives the
commitment no weight. The discriminator D learns by its own loss, with its own optimiser (adversary.py). With a frozen encoder
only the first line is left, and a generative decoder (`model.gan_decoder`) learns to use its noise: the second phase.
Source: BitDance paper (arXiv 2602.14041), tokenizer section.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from lfq_tokenizer import HierarchicalQuantizer, LFQTokenizer, LookupFreeQuantizer, TokenizerConfig
from lfq_tokenizer.growth import grow_generative
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
        tokenizer: LFQTokenizer,
        training: TokenizerTraining,
        compiled: bool = False,
        perceptual: LPIPS | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.training_config = tokenizer, training
        self.quantizer = quantizer_of(tokenizer.config, training)
        self.perceptual, self.adversary = Frozen(perceptual), Frozen(adversary)
        if training.freeze_encoder:
            tokenizer.encoder.requires_grad_(False)
        if compiled:
            tokenizer.encoder.compile()
            tokenizer.decoder.compile()

    def forward(self, images_B3HW: Tensor, generator: torch.Generator, step: int) -> Losses:
        weights = self.training_config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not weights.freeze_encoder):
            bits_BChw, q = self.quantizer(self.tokenizer.encoder(images_B3HW))
        noise = None
        if self.tokenizer.config.gan_decoder:
            noise = torch.randn(bits_BChw.shape, generator=generator).to(bits_BChw)
        out_B3HW = self.tokenizer.decoder(bits_BChw, noise).float()
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
            tokenizer = LFQTokenizer(training.model)
            adversary = Adversary(training.adversary) if training.adversary.weight else None
        if training.init:
            tokenizer.load_state_dict(_start(training).state_dict())
        elif training.freeze_encoder:
            raise ValueError("tokenizer.freeze_encoder trains a decoder for an encoder that exists; name it in tokenizer.init")
        perceptual = LPIPS.from_file(training.perceptual) if training.perceptual and training.perceptual_weight else None
        self.module = TokenizerObjective(tokenizer, training, config.run.compile, perceptual, adversary)
        self.discriminator = None
        if adversary is not None:
            optimizer = OptimizerConfig(
                lr=training.adversary.lr, betas=training.adversary.betas, eps=1e-8, warmup_steps=0, clip=config.optimizer.clip
            )
            self.discriminator = Discriminator(adversary, optimizer, training.adversary.start)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        tokenizer = _tokenizer(self.module)
        named: dict[str, nn.Module] = {"encoder": tokenizer.encoder, "decoder": tokenizer.decoder}
        return {name: [p for p in part.parameters() if p.requires_grad] for name, part in named.items()}

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


def _tokenizer(module: nn.Module) -> LFQTokenizer:
    assert isinstance(module, TokenizerObjective)
    return module.tokenizer


def _start(training: TokenizerTraining) -> LFQTokenizer:
    """The tokenizer of `training.init`, its plain decoder grown where the config asks for a generative one."""
    start = LFQTokenizer.from_pretrained(model_folder(training.init)).float()
    if training.model.gan_decoder and not start.config.gan_decoder:
        start = grow_generative(start)
    if start.config != training.model:
        raise ValueError(f"tokenizer.init {training.init} holds {start.config}, the config asks for {training.model}")
    return start
