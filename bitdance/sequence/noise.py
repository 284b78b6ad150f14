"""The random numbers of an image's loss, drawn ahead of the step.

They belong to the image and not to its batch: whatever images stand beside it and however many processes share the work,
an image meets the same flips, times and noise.

N tokens of an image, M = N/P blocks, S noise draws per block, P tokens per block, C bits per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdance.heads.diffusion.network import HeadConfig, draw_noise
from bitdance.sequence.perturbation import draw_perturbation


@dataclass(frozen=True)
class ImageNoise:
    """The random numbers of one image, or of several one after the other: perturbed input bits, times, noise."""

    flipped_NC: Tensor  # bool: input bits that the model sees with the wrong sign
    time_SM: Tensor
    noise_SMPC: Tensor

    @classmethod
    def draw(cls, N: int, config: HeadConfig, flip_max: float, generator: torch.Generator) -> "ImageNoise":
        """For an image of N tokens, in this order: flips, times, noise. ValueError for flip_max outside [0, 1]."""
        flipped_NC = draw_perturbation((N, config.ch_target), flip_max, generator)
        time, noise = draw_noise(config, N // config.parallel_num, generator)
        blocks = (config.diff_batch_mul, -1)
        return cls(flipped_NC, time.unflatten(0, blocks), noise.unflatten(0, blocks))

    @classmethod
    def joined(cls, parts: Sequence["ImageNoise | None"]) -> "ImageNoise | None":
        """One after the other; None where no part has any. ValueError where only some have."""
        drawn = [part for part in parts if part is not None]
        if not drawn:
            return None
        if len(drawn) < len(parts):
            raise ValueError(f"{len(drawn)} of {len(parts)} generated images bring their draws; give them to all or to none")
        return cls(
            torch.cat([part.flipped_NC for part in drawn]),
            torch.cat([part.time_SM for part in drawn], dim=1),
            torch.cat([part.noise_SMPC for part in drawn], dim=1),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ImageNoise":
        """The same numbers on `device`."""
        parts = (self.flipped_NC, self.time_SM, self.noise_SMPC)
        return ImageNoise(*(part.to(device, non_blocking=non_blocking) for part in parts))

    def pin_memory(self) -> "ImageNoise":
        """The same numbers in page-locked memory."""
        return ImageNoise(self.flipped_NC.pin_memory(), self.time_SM.pin_memory(), self.noise_SMPC.pin_memory())
