"""Recipe 'tokenizer': pictures → bits → pictures.

    loss = l1·|y − x| + l2·(y − x)² + perceptual·LPIPS(y, x) + adversary·(−D(y))
         + entropy·(H(sample) − H(mean)) + commitment·|z − sg(bits)|²

With `model.quantizer = "hbq"` a latent is several bits; then there is no entropy term, and published training gives the
commitment no weight. With "multi_scale" there are bits or codes at every scale (objective.py). The discriminator D learns by its
own loss, with its own optimiser (adversary.py). With a frozen encoder
only the first line is left, and a generative decoder (`model.gan_decoder`) learns to use its noise: the second phase.
Source: BitDance paper (arXiv 2602.14041), tokenizer section.
"""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.any_tokenizer import PictureTokenizer, build_tokenizer, load_tokenizer
from lfq_tokenizer.config import TokenizerConfig
from lfq_tokenizer.growth import grow_generative
from lfq_tokenizer.scale_vae import ScaleTokenizer
from stages.config import OptimizerConfig, TokenizerTraining, TrainingConfig
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.measure.reconstruction import measure_tokenizer, side_by_side
from stages.recipe import Discriminator
from stages.recipes.tokenizer.adversary import Adversary
from stages.recipes.tokenizer.feed import TokenizerFeed, as_images, picture_of
from stages.recipes.tokenizer.objective import TokenizerObjective, halves, objective_of
from stages.recipes.tokenizer.perceptual import LPIPS


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
    """The tokenizer of `training.init`, its plain decoder grown where the config asks for a generative one, its latents put
    together to tokens as the config asks; neither changes a bit."""
    start = load_tokenizer(model_folder(training.init)).float()
    if training.model.gan_decoder and isinstance(start, LFQTokenizer) and not start.config.gan_decoder:
        start = grow_generative(start)
    if isinstance(start, LFQTokenizer) and isinstance(training.model, TokenizerConfig):
        start.config = replace(start.config, patch=training.model.patch)
    if start.config != training.model:
        raise ValueError(f"tokenizer.init {training.init} holds {start.config}, the config asks for {training.model}")
    return start
