"""A PatchGAN that learns to tell pictures from reconstructions, and the losses between it and the tokenizer.

    discriminator  hinge = ½·mean(relu(1 − D(real))) + ½·mean(relu(1 + D(fake)))  +  lecam · LeCAM
    tokenizer      deceive = −mean(D(fake))

LeCAM keeps the two answers near the running mean of each other's opposite, so that a small data set cannot be learned by heart:
mean(relu(D(real) − ā_fake)²) + mean(relu(ā_real − D(fake))²).
Sources: BitDance paper (arXiv 2602.14041), tokenizer section; Isola et al. 2017 (PatchGAN); Tseng et al. 2021 (LeCAM).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer.config import NORM_GROUPS
from stages.config import AdversaryTraining


class PatchDiscriminator(nn.Module):
    """images (B,3,H,W) → one logit per overlapping patch, (B,1,H',W'); positive means real. `layers` halve the sides.

    # OURS: group norm where the original has batch norm: real and fake pictures need not share a batch, and processes
    # have no statistics to exchange.
    """

    def __init__(self, ch: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ch
        for layer in range(1, layers + 1):
            wider = ch * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        parts.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*parts)
        self.smallest_side = 3 * 2**layers  # so that the last two convolutions, which shrink by one, leave something
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        if min(images_B3HW.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"pictures of {images_B3HW.shape[2]}×{images_B3HW.shape[3]} are too small for this discriminator; sides must be "
                f"at least {self.smallest_side}: enlarge data.crop or lower tokenizer.adversary.layers"
            )
        return self.layers(images_B3HW)


class Adversary(nn.Module):
    """The discriminator with its own loss: `adversary(real, fake) -> (loss, scalars)`."""

    average_real: Tensor
    average_fake: Tensor

    def __init__(self, training: AdversaryTraining) -> None:
        super().__init__()
        self.discriminator = PatchDiscriminator(training.ch, training.layers)
        self.lecam_weight, self.lecam_decay = training.lecam_weight, training.lecam_decay
        self.register_buffer("average_real", torch.zeros(()))
        self.register_buffer("average_fake", torch.zeros(()))

    def forward(self, real_B3HW: Tensor, fake_B3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        real, fake = self.discriminator(real_B3HW).float(), self.discriminator(fake_B3HW.detach()).float()
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        lecam = (real - self.average_fake).relu().square().mean() + (self.average_real - fake).relu().square().mean()
        scalars = {"discriminator": hinge, "logit_real": real.mean(), "logit_fake": fake.mean(), "lecam": lecam}
        if self.training:
            self._follow(real.detach().mean(), fake.detach().mean())
        return hinge + self.lecam_weight * lecam, {k: v.detach() for k, v in scalars.items()}

    @torch.no_grad()
    def _follow(self, real: Tensor, fake: Tensor) -> None:
        """Move the running means towards the means over all processes."""
        means = torch.stack([real, fake])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self.average_real.lerp_(means[0], 1 - self.lecam_decay)
        self.average_fake.lerp_(means[1], 1 - self.lecam_decay)

    def deceive(self, fake_B3HW: Tensor) -> Tensor:
        """What the tokenizer minimises. The gradient reaches the pictures and leaves the discriminator's weights alone."""
        with _frozen(self.discriminator):
            return -self.discriminator(fake_B3HW).float().mean()


class _frozen:
    """Parameters of a module without gradient, for the length of a with-block."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for p in self.parameters:
            p.requires_grad_(True)
