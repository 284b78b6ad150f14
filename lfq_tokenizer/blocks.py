"""Pieces the encoder and the decoder share. Names of parameters are those of the published checkpoints."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer.config import NORM_GROUPS


def laid_out(x_BcHW: Tensor) -> Tensor:
    """The same numbers as convolutions take them fastest: on a CPU with the channels last in memory. A network calls it once,
    before its first layer; layers keep the layout that they get. In training the channels come first, as the way back through
    torch's group norm takes twice as long with the channels last (dev/LOG.md)."""
    if x_BcHW.device.type != "cpu":
        return x_BcHW
    return x_BcHW.contiguous(memory_format=torch.contiguous_format if torch.is_grad_enabled() else torch.channels_last)


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6, affine=affine)


class ResBlock(nn.Module):
    """GroupNorm → swish → 3×3 conv, twice, with a 1×1 conv on the skip where the width changes. No conv has a bias."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x_BcHW: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x_BcHW)))
        y = self.conv2(F.silu(self.norm2(y)))
        skip = x_BcHW if self.nin_shortcut is None else self.nin_shortcut(x_BcHW)
        return skip + y


class Upsample(nn.Module):
    """3×3 conv to four times the channels, then depth-to-space by 2 in (block-row, block-column, channel) order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x_BcHW: Tensor) -> Tensor:
        y = self.conv1(x_BcHW)
        B, c4, H, W = y.shape
        y = y.view(B, 2, 2, c4 // 4, H, W).permute(0, 4, 1, 5, 2, 3).reshape(B, 2 * H, 2 * W, c4 // 4).permute(0, 3, 1, 2)
        return y if x_BcHW.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm without affine, scaled by the spread and shifted by the mean of the bits over the whole grid."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.gamma = nn.Linear(bits, channels)
        self.beta = nn.Linear(bits, channels)
        # OURS: fresh weights start as a plain group norm, so that early gradients reach the encoder undistorted.
        for layer, start in ((self.gamma, 1.0), (self.beta, 0.0)):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, start)

    def modulation(self, bits_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma, beta), each (B,c,1,1), of the bits of whole pictures."""
        flat_BCN = bits_BChw.flatten(2)
        # OFFICIAL: the published decoders use the unbiased variance.
        spread_BC = torch.sqrt(flat_BCN.var(dim=2, unbiased=True) + 1e-6)
        return self.gamma(spread_BC)[:, :, None, None], self.beta(flat_BCN.mean(dim=2))[:, :, None, None]

    def forward(self, x_BcHW: Tensor, bits_BChw: Tensor) -> Tensor:
        gamma_Bc11, beta_Bc11 = self.modulation(bits_BChw)
        return self.norm(x_BcHW) * gamma_Bc11 + beta_Bc11
