"""The random numbers of a training step: they belong to the pictures and not to the network.

B pictures, N tokens, C bits per token, K = B·M·diff_batch_mul rows (blocks, all of them once per repeat), P tokens per block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitdance.heads.diffusion.network import draw_noise
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.sequence.perturbation import draw_perturbation


@dataclass(frozen=True)
class ClassDraws:
    """`flipped_BNC` input bits with the wrong sign, `dropped_B` pictures that get the null class; None: none of them."""

    time_K: Tensor
    noise_KPC: Tensor
    flipped_BNC: Tensor | None = None
    dropped_B: Tensor | None = None

    @classmethod
    def draw(cls, B: int, config: ClassPatchConfig, training: bool, generator: torch.Generator | None = None) -> "ClassDraws":
        """For B pictures, in the published order: flips and dropped classes (in training only), times, noise."""
        flipped = dropped = None
        if training:
            flipped = draw_perturbation((B, config.num_tokens, config.latent_dim), config.perturb_rate, generator)
            device = generator.device if generator is not None else None
            if config.class_dropout_prob > 0:
                dropped = torch.rand(B, generator=generator, device=device) < config.class_dropout_prob
        time_K, noise_KPC = draw_noise(config.head, B * config.num_blocks, generator)
        return cls(time_K, noise_KPC, flipped, dropped)
