"""Bits → picture, plain or generative."""

import torch
from torch import Tensor, nn

from lfq_tokenizer.blocks import AdaptiveGroupNorm, ResBlock, Upsample, group_norm, laid_out, swish
from lfq_tokenizer.config import TokenizerConfig


class _Level(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(depth))
        self.upsample = None if last else Upsample(c_out)


class Decoder(nn.Module):
    """bits (B,C,h,w) → images (B,3,H,W). The generative decoder reads standard normal noise beside the bits."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        bits = config.z_channels
        self.generative = config.gan_decoder
        self.conv_in = nn.Conv2d(2 * bits if self.generative else bits, widths[-1], 3, padding=1)
        self.mid_block = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(config.num_res_blocks))
        inputs = [*widths[1:], widths[-1]]  # width that enters level i
        self.up = nn.ModuleList(
            _Level(c_in, width, config.num_res_blocks, i == 0) for i, (c_in, width) in enumerate(zip(inputs, widths))
        )
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(bits, c_in) for c_in in inputs)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """Everything before the last norm, in order; an `AdaptiveGroupNorm` reads the bits too."""
        found: list[nn.Module] = [self.conv_in, *self.mid_block]
        for i in reversed(range(len(self.up))):
            found += [self.adaptive[i], *self.up[i].block]
            if self.up[i].upsample is not None:
                found.append(self.up[i].upsample)
        return found

    def start(self, bits_BChw: Tensor, noise_BChw: Tensor | None) -> Tensor:
        """What the first conv reads: the bits and, for a generative decoder, the noise beside them."""
        if not self.generative:
            return bits_BChw
        assert noise_BChw is not None and noise_BChw.shape == bits_BChw.shape
        return torch.cat([bits_BChw, noise_BChw], dim=1)

    def forward(self, bits_BChw: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
        x = laid_out(self.start(bits_BChw, noise_BChw))
        for layer in self.layers():
            x = layer(x, bits_BChw) if isinstance(layer, AdaptiveGroupNorm) else layer(x)
        return self.conv_out(swish(self.norm_out(x)))
