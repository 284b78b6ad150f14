"""Picture → latents, before the sign."""

from torch import Tensor, nn

from lfq_tokenizer.blocks import ResBlock, group_norm, laid_out, swish
from lfq_tokenizer.config import TokenizerConfig


class _Level(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(depth))
        self.downsample = None if last else nn.Conv2d(c_out, c_out, 3, stride=2, padding=1)


class Encoder(nn.Module):
    """images (B,3,H,W) in [-1,1] → latents (B,C,h,w) with h = H / downsampling. No attention."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            _Level(config.ch if i == 0 else widths[i - 1], width, config.num_res_blocks, i == last)
            for i, width in enumerate(widths)
        )
        self.mid_block = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(config.num_res_blocks))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def layers(self) -> list[nn.Module]:
        """Everything before the last norm, in order."""
        found: list[nn.Module] = [self.conv_in]
        for level in self.down:
            found += [*level.block] if level.downsample is None else [*level.block, level.downsample]
        return [*found, *self.mid_block]

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x = laid_out(images_B3HW)
        for layer in self.layers():
            x = layer(x)
        return self.conv_out(swish(self.norm_out(x)))
