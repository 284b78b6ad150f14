"""What users hold: pictures in, bits out, and back."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer.binary import binarize
from lfq_tokenizer.config import TokenizerConfig
from lfq_tokenizer.decoder import Decoder
from lfq_tokenizer.encoder import Encoder
from lfq_tokenizer.folder import read_folder, write_folder
from lfq_tokenizer.hierarchical import hierarchical_bits, hierarchical_values
from lfq_tokenizer.strips import decode_in_strips, encode_in_strips

# OURS: a whole picture takes about five activations at full size, in float32 12 GB for the published 32-bit tokenizer at this
# size; what it was trained for stays below.
STRIP_PIXELS = 1536 * 1536


class LFQTokenizer(nn.Module):
    """Image ⇄ bits with a convolutional encoder and decoder and the sign as quantiser, or with several bits per latent.

    Pictures of more than `strip_pixels` pixels are processed in strips of rows (`strips.py`): the same result to 1e-4 in
    float32, in the memory of one activation.
    Source: BitDance paper (arXiv 2602.14041), tokenizer section; parameter names of the published `ae.safetensors`.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.strip_pixels = STRIP_PIXELS
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def downsampling(self) -> int:
        return self.config.downsampling

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """images (B,3,H,W) in [-1,1] → bits (B,C,h,w) in {-1,+1}, or numbers in [-1,1]; h = H / downsampling.

        Bits carry no gradient. ValueError when the shape is not that of RGB pictures whose sides the downsampling divides, and
        when a latent is NaN.
        """
        shape, s = tuple(images_B3HW.shape), self.downsampling
        if len(shape) != 4 or shape[1] != 3 or shape[2] % s or shape[3] % s or 0 in shape:
            raise ValueError(f"images have shape {shape}; expected (batch, 3, H, W) with H and W multiples of {s}")
        if shape[2] * shape[3] > self.strip_pixels:
            return self._quantized(encode_in_strips(self.encoder, images_B3HW))
        return self._quantized(self.encoder(images_B3HW))

    def _quantized(self, z_BChw: Tensor) -> Tensor:
        if self.config.quantizer == "lfq":
            bits_BChw = binarize(z_BChw)
        else:
            z_BChw = z_BChw.tanh()
            bits_BChw = hierarchical_bits(z_BChw, self.config.rounds) if self.config.quantizer == "hbq" else z_BChw
        return F.pixel_unshuffle(bits_BChw, self.config.patch)

    def decode(self, bits_BChw: Tensor, generator: torch.Generator | None = None, strips: bool | None = None) -> Tensor:
        """What `encode` returns (B,C,h,w) → images (B,3,H,W), about [-1,1] (not clamped).

        A generative decoder draws its noise, one number per latent, from `generator` (on the generator's device).
        `strips` says whether rows go one strip after another; None: where a picture has more than `strip_pixels` pixels. They
        do only where no gradient is wanted (`torch.no_grad()`); otherwise a warning says so.
        """
        shape = tuple(bits_BChw.shape)
        if len(shape) != 4 or shape[1] != self.config.width:
            raise ValueError(f"bits have shape {shape}; expected (batch, {self.config.width}, h, w)")
        bits_BChw = F.pixel_shuffle(bits_BChw, self.config.patch)
        if bits_BChw.shape[2] * bits_BChw.shape[3] < 2:
            raise ValueError(f"a grid of {shape[2]}×{shape[3]} tokens has no spread over the grid; decode at least 2 tokens")
        if self.config.quantizer == "hbq":
            bits_BChw = hierarchical_values(bits_BChw, self.config.rounds)
        shape = tuple(bits_BChw.shape)
        noise = None
        if self.config.gan_decoder:
            device = generator.device if generator is not None else bits_BChw.device
            noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(bits_BChw)
        if strips is None:
            strips = shape[2] * shape[3] * self.config.stride**2 > self.strip_pixels
        if strips:
            wanted = any(t.requires_grad for t in (bits_BChw, *self.decoder.parameters()))
            if not (wanted and torch.is_grad_enabled()):
                return decode_in_strips(self.decoder, bits_BChw, noise)
            warnings.warn("a large picture is decoded whole to keep its gradient; torch.no_grad() saves memory", stacklevel=2)
        return self.decoder(bits_BChw, noise)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "LFQTokenizer":
        """Read `ae_config.json` and `ae.safetensors` of a folder, or of "demo", the bundled model; the dtype on disk is
        the dtype of the module.

        FileNotFoundError or ValueError name the file and, for wrong tensors, the first ten offenders.
        """
        return read_folder(cls, TokenizerConfig.from_published, folder)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `ae_config.json` and `ae.safetensors` (published layout); each file appears whole or not at all."""
        write_folder(self, folder)
