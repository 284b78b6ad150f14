"""Pieces the encoder and the decoder share. Names of parameters are those of the published checkpoints."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer.config import NORM_GROUPS

PIXELS = 2048  # as many can be added up one after the other


def laid_out(x_BcHW: Tensor) -> Tensor:
    """The same numbers as convolutions take them fastest: on a CPU with the channels last in memory. A network calls it once,
    before its first layer; layers keep the layout that they get. In training the channels come first, as the way back through
    torch's group norm takes twice as long with the channels last (dev/LOG.md)."""
    if x_BcHW.device.type != "cpu":
        return x_BcHW
    return x_BcHW.contiguous(memory_format=torch.contiguous_format if torch.is_grad_enabled() else torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """torch's, as exact on a CPU with the channels last as with the channels first.

    # OURS: with the channels last torch adds up the pixels of a channel one after the other, and their squares without taking
    # the mean off. At 256×256 pixels, and a mean of three deviations, a float32 is off by 3e-4 then, and by 3e-6 here.
    """

    def forward(self, x_BcHW: Tensor) -> Tensor:
        inexact = x_BcHW.device.type == "cpu" and x_BcHW.dtype in (torch.float32, torch.float64) and not x_BcHW.is_contiguous()
        if torch.is_grad_enabled() or not inexact:
            return super().forward(x_BcHW)
        scale_Bc, shift_Bc = (torch.stack(rows) for rows in zip(*(self._line(x_cHW) for x_cHW in x_BcHW), strict=True))
        return torch.addcmul(shift_Bc[:, :, None, None], x_BcHW, scale_Bc[:, :, None, None])

    def _line(self, x_cHW: Tensor) -> tuple[Tensor, Tensor]:
        """(scale_c, shift_c) that normalise one picture: of its parts by torch, merged in float64 (Chan et al. 1979)."""
        parts = x_cHW.split(max(1, PIXELS // x_cHW.shape[2]), dim=1)
        of_parts = zip(*(torch.batch_norm_update_stats(part[None], None, None, 0.0) for part in parts), strict=True)
        means_Kc, variances_Kc = (torch.stack(one).double() for one in of_parts)
        share_K1 = means_Kc.new_tensor([part.shape[1] / x_cHW.shape[1] for part in parts])[:, None]
        mean_c = (share_K1 * means_Kc).sum(dim=0)
        scale_c, shift_c = line_of(self, mean_c, (share_K1 * (variances_Kc + (means_Kc - mean_c).square())).sum(dim=0))
        return scale_c.to(x_cHW.dtype), shift_c.to(x_cHW.dtype)


def line_of(norm: nn.GroupNorm, mean_c: Tensor, variance_c: Tensor) -> tuple[Tensor, Tensor]:
    """(scale_c, shift_c) with which `norm` normalises a picture whose channels have these means and variances (float64)."""
    mean_Gk, variance_Gk = (one.view(norm.num_groups, -1) for one in (mean_c, variance_c))
    mean_G1 = mean_Gk.mean(dim=1, keepdim=True)
    variance_G1 = (variance_Gk + (mean_Gk - mean_G1).square()).mean(dim=1, keepdim=True)
    scale_Gk = torch.rsqrt(variance_G1 + norm.eps).expand_as(mean_Gk)
    scale_c, shift_c = scale_Gk.flatten(), (-mean_G1 * scale_Gk).flatten()
    if norm.affine:
        weight_c, bias_c = (parameter.detach().to(mean_c.device).double() for parameter in (norm.weight, norm.bias))
        scale_c, shift_c = scale_c * weight_c, shift_c * weight_c + bias_c
    return scale_c, shift_c


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    return GroupNorm(NORM_GROUPS, channels, eps=1e-6, affine=affine)


def swish(x: Tensor) -> Tensor:
    """x·sigmoid(x). Without a gradient in place: fresh memory takes longer than the arithmetic."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """GroupNorm → swish → 3×3 conv, twice, with a 1×1 conv on the skip where the width changes. BitDance's have no `bias`."""

    def __init__(self, c_in: int, c_out: int, bias: bool = False) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1, bias=bias) if c_in != c_out else None

    def forward(self, x_BcHW: Tensor) -> Tensor:
        y = self.conv1(swish(self.norm1(x_BcHW)))
        y = self.conv2(swish(self.norm2(y)))
        skip = x_BcHW if self.nin_shortcut is None else self.nin_shortcut(x_BcHW)
        return skip + y if torch.is_grad_enabled() else y.add_(skip)


class Upsample(nn.Module):
    """3×3 conv to four times the channels, then depth-to-space by 2 in (block-row, block-column, channel) order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x_BcHW: Tensor) -> Tensor:
        y = self.conv1(x_BcHW)
        B, c4, H, W = y.shape
        y_BcH2W2 = y.view(B, 2, 2, c4 // 4, H, W).permute(0, 3, 4, 1, 5, 2)
        if not x_BcHW.is_contiguous(memory_format=torch.channels_last):
            return y_BcH2W2.reshape(B, c4 // 4, 2 * H, 2 * W)
        return y_BcH2W2.permute(0, 2, 3, 4, 5, 1).reshape(B, 2 * H, 2 * W, c4 // 4).permute(0, 3, 1, 2)


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
