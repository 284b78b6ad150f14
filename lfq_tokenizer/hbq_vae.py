"""The published HBQ tokenizer: a video autoencoder of which pictures use one frame, so that all of it is two-dimensional.

What a video needs besides (convolutions over time, further frames) is left out of the weights here: with one frame a causal
convolution sees two zero frames first, so only its last slice acts. Parameter names are the published ones.

B pictures, C latent channels, h w token grid. Source: GRN paper (arXiv 2604.13030); its public code and files.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer import limits
from lfq_tokenizer.blocks import laid_out
from lfq_tokenizer.folder import read_folder, write_folder
from lfq_tokenizer.hierarchical import hierarchical_bits, hierarchical_values

WIDTHS = (1, 2, 4, 4)  # of the levels, times `dim`; the decoder's the other way round, times `dec_dim`
SLOTS = (1, 2, 2)  # frames that a skip between levels folds; of one picture all but the last are zeros


@dataclass(frozen=True)
class HBQConfig:
    """`latent_channels` latents per token of `rounds` bits each; `dim` and `dec_dim` are the base widths of encoder and decoder,
    `num_res_blocks` the encoder's blocks per level (the decoder has one more). Published: 160, 256, two blocks, four rounds."""

    latent_channels: int = 16
    rounds: int = 4
    dim: int = 160
    dec_dim: int = 256
    num_res_blocks: int = 2

    gan_decoder = False  # no noise beside the bits

    def __post_init__(self) -> None:
        most = {"latent_channels": limits.WIDTH, "rounds": 16, "dim": limits.WIDTH, "dec_dim": limits.WIDTH}
        for name, value in asdict(self).items():
            high = most.get(name, limits.LAYERS)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
                raise ValueError(f"hbq {name} = {value!r:.60}; a whole number from 1 to {high} is allowed")

    @property
    def latents(self) -> int:
        """Latents per token."""
        return self.latent_channels

    @property
    def bits(self) -> int:
        """Bits per token."""
        return self.latent_channels * self.rounds

    @property
    def token(self) -> str:
        """What a token is; a model must have been trained on the same."""
        return f"{self.bits} bits"

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return self.stride

    @property
    def stride(self) -> int:
        """Pixels per latent along a side; a token is one."""
        return 2 ** len(WIDTHS)

    @property
    def layers(self) -> int:
        """Residual blocks of the encoder."""
        return len(WIDTHS) * self.num_res_blocks

    @classmethod
    def from_published(cls, data: Any) -> "HBQConfig":
        """From the JSON object {"hbq": {…}} of an `ae_config.json`. ValueError for unknown keys and values."""
        fields = data.get("hbq") if isinstance(data, Mapping) and set(data) == {"hbq"} else None
        if not isinstance(fields, Mapping) or (unknown := set(fields) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f'expected {{"hbq": {{…}}}} with {known}' + (f"; unknown {sorted(unknown)}" if fields else ""))
        return cls(**fields)

    def to_published(self) -> dict[str, Any]:
        """The JSON object that `from_published` reads."""
        return {"hbq": asdict(self)}

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], rounds: int) -> "HBQConfig":
        """From the shapes of a published file. ValueError names a tensor that is missing."""
        for name in ("conv2.weight", "encoder.conv1.weight", "decoder.head.2.weight"):
            if len(shapes.get(name, ())) < 4:
                raise ValueError(f"no tensor {name}; this is no HBQ tokenizer")
        blocks = 0
        while f"encoder.downsamples.0.downsamples.{blocks}.residual.2.weight" in shapes:
            blocks += 1
        return cls(
            shapes["conv2.weight"][1], rounds, shapes["encoder.conv1.weight"][0], shapes["decoder.head.2.weight"][1], blocks
        )


class HBQTokenizer(nn.Module):
    """Picture ⇄ bits, 16 pixels per token along a side; what users hold, with the methods of `LFQTokenizer`."""

    def __init__(self, config: HBQConfig) -> None:
        super().__init__()
        self.config, C = config, config.latent_channels
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv2d(2 * C, 2 * C, 1)
        self.conv2 = nn.Conv2d(C, C, 1)
        self.decoder = Decoder(config)

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return self.config.downsampling

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """Images in [-1,1] → latents (B,C,h,w) in (-1,1), before they become bits."""
        mean, _ = self.conv1(self.encoder(images_B3HW)).chunk(2, dim=1)
        return mean.tanh()

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] → bits (B,rounds·C,h,w) in {-1,+1}. ValueError for sides that are no multiples of 16."""
        shape, s = tuple(images_B3HW.shape), self.downsampling
        if len(shape) != 4 or shape[1] != 3 or shape[2] % s or shape[3] % s or 0 in shape:
            raise ValueError(f"images have shape {shape}; expected (batch, 3, H, W) with H and W multiples of {s}")
        return hierarchical_bits(self.latents(images_B3HW), self.config.rounds)

    def decode(self, bits_BChw: Tensor, generator: torch.Generator | None = None, strips: bool | None = None) -> Tensor:
        """Bits (B,rounds·C,h,w) in {-1,+1} → images (B,3,H,W), about [-1,1] (not clamped). `generator` and `strips` are those of
        `LFQTokenizer`: this decoder draws nothing, and works on whole pictures."""
        shape = tuple(bits_BChw.shape)
        if len(shape) != 4 or shape[1] != self.config.bits:
            raise ValueError(f"bits have shape {shape}; expected (batch, {self.config.bits}, h, w)")
        return self.decoder(self.conv2(hierarchical_values(bits_BChw, self.config.rounds)))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "HBQTokenizer":
        """Read `ae_config.json` and `ae.safetensors` of a folder. FileNotFoundError or ValueError name the file."""
        return read_folder(cls, HBQConfig.from_published, folder)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `ae_config.json` and `ae.safetensors`; each file appears whole or not at all."""
        write_folder(self, folder)


def picture_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published file as they act on pictures: the last slice of each convolution over time."""
    found = {}
    for name, tensor in state.items():
        if ".time_conv." in name:
            continue
        found[name] = tensor[:, :, -1] if tensor.ndim == 5 else tensor.reshape(-1, 1, 1) if name.endswith("gamma") else tensor
    return found


class Norm(nn.Module):
    """Each pixel's channels scaled to length √C, times a learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x_BChw: Tensor) -> Tensor:
        return F.normalize(x_BChw, dim=1) * (x_BChw.shape[1] ** 0.5 * self.gamma)


class Block(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input, which a 1×1 convolution fits where the widths differ."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        conv = (nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.residual = nn.Sequential(Norm(c_in), nn.SiLU(), conv[0], Norm(c_out), nn.SiLU(), nn.Identity(), conv[1])
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.shortcut(x_BChw) + self.residual(x_BChw)


class Attention(nn.Module):
    """One head over all positions, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x_BChw)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(*qkv)[:, 0].transpose(1, 2)
        return x_BChw + self.proj(mixed.reshape(x_BChw.shape))


class Resample(nn.Module):
    """A convolution that halves the sides, zeros beyond right and bottom, or one after they were doubled."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        first: nn.Module = nn.Upsample(scale_factor=2) if up else nn.ZeroPad2d((0, 1, 0, 1))
        self.resample = nn.Sequential(first, nn.Conv2d(width, width, 3, 1 if up else 2, padding=int(up)))

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.resample(x_BChw)


class Down(nn.Module):
    """A level of the encoder: blocks, then half the sides; plus its input, averaged down to the same shape."""

    def __init__(self, c_in: int, c_out: int, depth: int, slots: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = [Block(c_in if i == 0 else c_out, c_out) for i in range(depth)]
        self.downsamples = nn.Sequential(*blocks, *([Resample(c_out, up=False)] if slots else []))
        self.c_out, self.slots = c_out, slots

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.downsamples(x_BChw) + (self._skip(x_BChw) if self.slots else x_BChw)

    def _skip(self, x_BChw: Tensor) -> Tensor:
        B, C, h, w = x_BChw.shape
        x = F.pixel_unshuffle(x_BChw, 2).reshape(B, C, 1, 4, h // 2, w // 2)
        x = F.pad(x, (0, 0, 0, 0, 0, 0, self.slots - 1, 0))  # frames before the first are zeros
        return x.reshape(B, self.c_out, -1, h // 2, w // 2).mean(dim=2)


class Up(nn.Module):
    """A level of the decoder: blocks, then twice the sides; plus its input, repeated up to the same shape."""

    def __init__(self, c_in: int, c_out: int, depth: int, slots: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = [Block(c_in if i == 0 else c_out, c_out) for i in range(depth)]
        self.upsamples = nn.Sequential(*blocks, *([Resample(c_out, up=True)] if slots else []))
        self.c_out, self.slots = c_out, slots

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.upsamples(x_BChw) + (self._skip(x_BChw) if self.slots else 0)

    def _skip(self, x_BChw: Tensor) -> Tensor:
        B, C, h, w = x_BChw.shape
        x = x_BChw.repeat_interleave(4 * self.slots * self.c_out // C, dim=1)
        return F.pixel_shuffle(x.reshape(B, self.c_out, self.slots, 4, h, w)[:, :, -1].flatten(1, 2), 2)


class Encoder(nn.Module):
    """Images (B,3,H,W) → (B,2C,h,w), what `conv1` makes latents of."""

    def __init__(self, c: HBQConfig) -> None:
        super().__init__()
        widths = [c.dim * factor for factor in (1, *WIDTHS)]
        self.conv1 = nn.Conv2d(12, c.dim, 3, padding=1)
        levels = zip(widths[:-1], widths[1:], (*SLOTS, 0), strict=True)
        self.downsamples = nn.Sequential(*(Down(c_in, c_out, c.num_res_blocks, slots) for c_in, c_out, slots in levels))
        self.middle = _middle(widths[-1])
        self.head = nn.Sequential(Norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(images_B3HW.transpose(2, 3), 2).transpose(2, 3)  # channel 4c + 2·column + row
        return self.head(self.middle(self.downsamples(self.conv1(laid_out(folded)))))


class Decoder(nn.Module):
    """Latents (B,C,h,w), through `conv2`, → images (B,3,H,W)."""

    def __init__(self, c: HBQConfig) -> None:
        super().__init__()
        widths = [c.dec_dim * factor for factor in (WIDTHS[-1], *reversed(WIDTHS))]
        self.conv1 = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.middle = _middle(widths[0])
        levels = zip(widths[:-1], widths[1:], (*reversed(SLOTS), 0), strict=True)
        self.upsamples = nn.Sequential(*(Up(c_in, c_out, c.num_res_blocks + 1, slots) for c_in, c_out, slots in levels))
        self.head = nn.Sequential(Norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 12, 3, padding=1))

    def forward(self, latents_BChw: Tensor) -> Tensor:
        folded = self.head(self.upsamples(self.middle(self.conv1(laid_out(latents_BChw)))))
        return F.pixel_shuffle(folded.transpose(2, 3), 2).transpose(2, 3)


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(Block(width, width), Attention(width), Block(width, width))
