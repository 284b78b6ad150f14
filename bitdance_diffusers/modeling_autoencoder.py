"""The picture tokenizer as a component. B pictures, C bits per token, h×w tokens, H×W pixels."""

from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401 (by this name, in this module, diffusers knows how to load its classes)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from bitdance_diffusers.component import Component
from lfq_tokenizer import LFQTokenizer, TokenizerConfig

__all__ = ["BitDanceAutoencoder"]


class BitDanceAutoencoder(Component):
    """Pictures ⇄ bits. Its config is that of the published `ae_config.json`."""

    _supports_group_offloading = True

    @register_to_config
    def __init__(self, ddconfig: dict[str, Any], gan_decoder: bool = False) -> None:
        super().__init__()
        self.hold(LFQTokenizer(TokenizerConfig.from_published({"ddconfig": ddconfig, "gan_decoder": gan_decoder})))

    def forward(self, bits_BChw: Tensor, generator: torch.Generator | None = None, strips: bool | None = None) -> Tensor:
        """Bits (B,C,h,w) in {-1,+1} → pictures (B,3,H,W), about [-1,1]; see `LFQTokenizer.decode`."""
        return self.inner.decode(bits_BChw.to(_dtype(self)), generator, strips)

    def decode(self, bits_BChw: Tensor, generator: torch.Generator | None = None, strips: bool | None = None) -> Tensor:
        """The same, through the hooks on `forward`."""
        return self(bits_BChw, generator, strips)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] → bits (B,C,h,w). No hook on `forward` fires here: the weights must be there."""
        return self.inner.encode(images_B3HW.to(_dtype(self)))


def _dtype(module: Component) -> torch.dtype:
    return next(module.parameters()).dtype
