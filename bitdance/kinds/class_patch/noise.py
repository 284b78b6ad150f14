"""The random numbers of a training step: they belong to the pictures and not to the network.

B pictures, N tokens, C bits per token, K = B·M·diff_batch_mul rows (blocks, all of them once per repeat), P tokens per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdance.heads.diffusion.network import draw_noise
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.sequence.perturbation import draw_perturbation


@dataclass(frozen=True)
class ClassNoise:
    """`flipped_BNC` input bits with the wrong sign, `dropped_B` pictures that get the null class; None: none of them."""

    time_K: Tensor
    noise_KPC: Tensor
    flipped_BNC: Tensor | None = None
    dropped_B: Tensor | None = None

    @classmethod
    def draw(cls, B: int, config: ClassPatchConfig, training: bool, generator: torch.Generator | None = None) -> "ClassNoise":
        """For B pictures, in the published order: flips and dropped classes (in training only), times, noise."""
        flipped = dropped = None
        if training:
            flipped = draw_perturbation((B, config.num_tokens, config.latent_dim), config.perturb_rate, generator)
            device = generator.device if generator is not None else None
            if config.class_dropout_prob > 0:
                dropped = torch.rand(B, generator=generator, device=device) < config.class_dropout_prob
        time_K, noise_KPC = draw_noise(config.head, B * config.num_blocks, generator)
        return cls(time_K, noise_KPC, flipped, dropped)

    @classmethod
    def joined(cls, noise: Sequence["ClassNoise"], config: ClassPatchConfig) -> "ClassNoise":
        """Those of several batches as those of one; either all of them flip and drop, or none does."""

        def rows(parts: list[Tensor]) -> Tensor:
            """Every repeat of the blocks holds those of all batches."""
            return torch.cat([part.unflatten(0, (config.diff_batch_mul, -1)) for part in parts], dim=1).flatten(0, 1)

        flipped = [one.flipped_BNC for one in noise if one.flipped_BNC is not None]
        dropped = [one.dropped_B for one in noise if one.dropped_B is not None]
        return cls(
            rows([one.time_K for one in noise]),
            rows([one.noise_KPC for one in noise]),
            torch.cat(flipped) if flipped else None,
            torch.cat(dropped) if dropped else None,
        )

    def to(self, device: torch.device | str) -> "ClassNoise":
        """The same on a device."""
        flipped, dropped = (x if x is None else x.to(device) for x in (self.flipped_BNC, self.dropped_B))
        return ClassNoise(self.time_K.to(device), self.noise_KPC.to(device), flipped, dropped)
