"""The picture tokenizers of next-scale models: one convolutional network around either quantiser of `scales.py`.

VAR's has attention at the coarsest level and a 3×3 convolution on either side of the codes; Infinity's has neither. Parameter
names are VAR's; Infinity's files wrap every layer once more (`scale_file.py`).

B pictures, Z latents per position, K scales. Sources: VAR paper (arXiv 2404.02905), Infinity paper (arXiv 2412.04431); public
codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer import limits
from lfq_tokenizer.blocks import ResBlock, group_norm, laid_out, swish
from lfq_tokenizer.config import NORM_GROUPS
from lfq_tokenizer.folder import read_folder, write_folder
from lfq_tokenizer.scales import ScaleBits, ScaleCodes, ScaleQuantizer, Side, squares

QUANTIZERS = ("codes", "bits")


@dataclass(frozen=True)
class ScaleConfig:
    """`quantizer` "codes" (VAR: a table of `codes`, smoothed by `shared` convolutions) or "bits" (Infinity). `latents` per
    position, `ch` and `ch_mult` widths, `num_res_blocks` of the encoder's levels (the decoder's have one more); `patchify`: a
    token of bits is 2 × 2 positions. `sides`: the scales that it was trained with, (h, w) of each; none where nobody says."""

    quantizer: str
    latents: int
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    codes: int = 0
    shared: int = 4
    ratio: float = 0.5
    scales: int = 10
    patchify: bool = False
    sides: tuple[Side, ...] = ()

    gan_decoder = False  # no noise beside the tokens

    def __post_init__(self) -> None:
        if not isinstance(self.quantizer, str) or self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer = {self.quantizer!r:.60}; allowed are {', '.join(QUANTIZERS)}")
        if not isinstance(self.ch_mult, list | tuple) or not 1 <= len(self.ch_mult) <= limits.LEVELS:
            raise ValueError(f"ch_mult = {self.ch_mult!r:.60}; one width factor per level is allowed")
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        least = {"codes": 2 if self.quantizer == "codes" else 0, "shared": 0}
        numbers = [(n, getattr(self, n)) for n in ("latents", "ch", "num_res_blocks", "codes", "shared", "scales")]
        for name, value in [*numbers, *(("ch_mult", factor) for factor in self.ch_mult)]:
            low = least.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= limits.WIDTH:
                raise ValueError(f"{name} = {value!r:.60}; a whole number from {low} to {limits.WIDTH} is allowed")
        if not isinstance(self.patchify, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise ValueError(
                f"patchify = {self.patchify!r:.60}, ratio = {self.ratio!r:.60}; true or false, and 0 to 1 are allowed"
            )
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ch = {self.ch}; group norm needs a multiple of {NORM_GROUPS}")
        object.__setattr__(self, "sides", tuple(squares(self.sides)))

    @property
    def attention(self) -> bool:
        """Whether there is attention at the coarsest level."""
        return self.quantizer == "codes"

    @property
    def bits(self) -> int:
        """Bits per token; of codes as many as tell them apart."""
        if self.quantizer == "codes":
            return max(1, (self.codes - 1).bit_length())
        return self.latents * (4 if self.patchify else 1)

    @property
    def token(self) -> str:
        """What a token is; a model must have been trained on the same."""
        if self.quantizer == "codes":
            return f"one of {self.codes} codes of {self.latents} numbers at every scale"
        return f"{self.bits} bits at every scale"

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side, at the last scale."""
        return self.stride * (2 if self.patchify else 1)

    @property
    def stride(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def layers(self) -> int:
        """Residual blocks of the encoder's levels."""
        return len(self.ch_mult) * self.num_res_blocks

    @classmethod
    def from_published(cls, data: Any) -> "ScaleConfig":
        """From the JSON object {"scales": {…}} of an `ae_config.json`. ValueError for unknown keys and values."""
        fields = data.get("scales") if isinstance(data, Mapping) and set(data) == {"scales"} else None
        if not isinstance(fields, Mapping) or (unknown := set(fields) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f'expected {{"scales": {{…}}}} with {known}' + (f"; unknown {sorted(unknown)}" if fields else ""))
        if missing := {"quantizer", "latents"} - set(fields):
            raise ValueError(f"the tokenizer config lacks {', '.join(sorted(missing))}")
        return cls(**fields)

    def to_published(self) -> dict[str, Any]:
        """The JSON object that `from_published` reads."""
        sides = {"sides": [list(side) for side in self.sides]} if self.sides else {}
        return {"scales": {**asdict(self), "ch_mult": list(self.ch_mult), **sides}}


class ScaleTokenizer(nn.Module):
    """Picture ⇄ tokens of every scale; what users hold."""

    def __init__(self, config: ScaleConfig) -> None:
        super().__init__()
        self.config, Z = config, config.latents
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize: ScaleQuantizer
        if config.quantizer == "codes":
            self.quantize = ScaleCodes(config.codes, Z, config.scales, config.shared, config.ratio)
            self.quant_conv, self.post_quant_conv = (nn.Conv2d(Z, Z, 3, padding=1) for _ in range(2))
        else:
            self.quantize = ScaleBits(Z, config.patchify)
            self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side, at the last scale."""
        return self.config.downsampling

    def patchified(self) -> "ScaleTokenizer":
        """The same weights with tokens of 2 × 2 positions."""
        with torch.device("meta"):
            other = ScaleTokenizer(replace(self.config, patchify=True))
        other.load_state_dict(self.state_dict(), strict=True, assign=True)
        return other.eval()

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """Images in [-1,1] → what is quantised (B,Z,h,w)."""
        return self.quant_conv(self.encoder(images_B3HW))

    def encode(self, images_B3HW: Tensor, sides: Sequence[Side] = ()) -> list[Tensor]:
        """Images (B,3,H,W) in [-1,1] → tokens of every scale: indices (B,h_k,w_k), or bits (B,T,h_k,w_k) in {-1,+1}. `sides` of
        the scales; without them those that the config says. ValueError where there are none, and where the last does not fit
        the pictures."""
        shape, s, sides = tuple(images_B3HW.shape), self.downsampling, sides or self.config.sides
        if not sides:
            raise ValueError("this tokenizer's config names no scales; say which as `sides`, (h, w) of each")
        if len(shape) != 4 or shape[1] != 3 or (shape[2], shape[3]) != tuple(s * side for side in sides[-1]):
            last = "×".join(str(s * side) for side in sides[-1])
            raise ValueError(f"images have shape {shape}; expected (batch, 3, H, W) with H×W = {last}")
        return self.quantize.encode(self.latents(images_B3HW), sides)

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens of every scale → images (B,3,H,W) in [-1,1]."""
        sides = [(one.shape[-2], one.shape[-1]) for one in tokens]
        return self.decode_sum(self.quantize.sums(tokens, sides)[-1])

    def decode_sum(self, sum_BZhw: Tensor) -> Tensor:
        """The sum of all scales → images (B,3,H,W) in [-1,1]."""
        weight = next(self.decoder.parameters())
        return self.decoder(self.post_quant_conv(sum_BZhw.to(weight.dtype))).clamp(-1, 1)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "ScaleTokenizer":
        """Read `ae_config.json` and `ae.safetensors` of a folder. FileNotFoundError or ValueError name the file."""
        return read_folder(cls, ScaleConfig.from_published, folder)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `ae_config.json` and `ae.safetensors`; each file appears whole or not at all."""
        write_folder(self, folder)


class Attention(nn.Module):
    """One head over all positions, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj_out = group_norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(*qkv)[:, 0].transpose(1, 2)
        return x + self.proj_out(mixed.reshape(x.shape))


class Down(nn.Module):
    """Half the sides: zeros beyond right and bottom, then a convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Twice the sides: each pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, each followed by attention where there is any; `downsample` or `upsample` follows."""

    def __init__(self, c_in: int, c_out: int, depth: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, bias=True) for i in range(depth))
        self.attn = nn.ModuleList(Attention(c_out) for _ in range(depth if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self._modules[name](x)
        return x


class Middle(nn.Module):
    """Block, attention where there is any, block."""

    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.block_1, self.block_2 = (ResBlock(width, width, bias=True) for _ in range(2))
        self.attn_1 = Attention(width) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B,3,H,W) → (B,Z,h,w)."""

    def __init__(self, c: ScaleConfig) -> None:
        super().__init__()
        widths, last = [c.ch * factor for factor in c.ch_mult], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(3, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(c.ch if i == 0 else widths[i - 1], width, c.num_res_blocks, c.attention and i == last)
            if i < last:
                level.downsample = Down(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], c.attention)
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], c.latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(laid_out(x))
        for level in self.down:
            x = level(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B,Z,h,w) → images (B,3,H,W), not clamped."""

    def __init__(self, c: ScaleConfig) -> None:
        super().__init__()
        widths, last = [c.ch * factor for factor in c.ch_mult], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(c.latents, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], c.attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, last)], width, c.num_res_blocks + 1, c.attention and i == last)
            if i > 0:
                level.upsample = Up(width)
            self.up.append(level)
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(laid_out(x)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(swish(self.norm_out(x)))
