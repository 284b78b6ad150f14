"""Encoder and decoder on pictures of any size, exactly: layer by layer, each layer strip by strip.

One activation of the network exists at a time, held as chunks of rows that are let go while the next one is made. What a layer
needs beyond its strip (one row for a 3×3 conv, two for a residual block) is read from the neighbouring strips; at the edges of
the picture the convs pad with zeros themselves, as ever. Group norms keep the statistics of the whole picture: those of an
activation are gathered while it is written, those inside a residual block by a first pass whose result is thrown away. So the
memory is that of one activation, and the convs run about 1.5 times. Nothing here carries a gradient.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfq_tokenizer.blocks import AdaptiveGroupNorm, ResBlock, Upsample, laid_out, line_of
from lfq_tokenizer.config import TokenizerConfig
from lfq_tokenizer.decoder import Decoder
from lfq_tokenizer.encoder import Encoder

Layer = Callable[[Tensor], Tensor]
# OURS: small strips stay near the processor's caches; under MIN_ROWS rows the halo would be most of the work.
STRIP_ELEMENTS = 2**21
MIN_ROWS = 16
# Large enough for the system to take each back when it is let go; smaller pieces would leave holes.
CHUNK_BYTES = 2**25


class _Moments:
    """Mean and sum of squared deviations of every channel, merged strip by strip in float64 (Chan et al. 1979).

    They stay on the device of the strips, so that nothing waits for it, unless that knows no float64.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.mean_c = torch.zeros(channels, dtype=torch.float64, device=self.device)
        self.squares_c = torch.zeros_like(self.mean_c)

    def add(self, x_1crW: Tensor) -> None:
        x_1crW = x_1crW if x_1crW.dtype == torch.float64 else x_1crW.float()
        center_1c11 = x_1crW.mean(dim=(2, 3), keepdim=True)
        squares_c = (x_1crW - center_1c11).square_().sum(dim=(0, 2, 3)).to(self.device).double()
        new, old = x_1crW.shape[2] * x_1crW.shape[3], self.count
        self.count += new
        step_c = center_1c11.flatten().to(self.device).double() - self.mean_c
        self.mean_c += step_c * (new / self.count)
        self.squares_c += squares_c + step_c.square() * (old * new / self.count)

    def normaliser(self, norm: nn.GroupNorm) -> Layer:
        """`norm` with these statistics instead of those of its argument."""
        scale_c, shift_c = line_of(norm, self.mean_c, self.squares_c / self.count)

        def normalise(x_1crW: Tensor) -> Tensor:
            dtype = torch.promote_types(x_1crW.dtype, torch.float32)
            scale, shift = (v.to(dtype).to(x_1crW.device)[:, None, None] for v in (scale_c, shift_c))
            return (x_1crW * scale).add_(shift).to(x_1crW.dtype)

        return normalise


class _Activation:
    """One activation (1,c,H,W) as chunks of rows from top to bottom, made of strips, with its moments."""

    def __init__(self, strips: Iterable[Tensor]) -> None:
        self.chunks: list[Tensor | None] = []
        self.ends: list[int] = []
        pending: list[Tensor] = []
        self.height = 0
        for strip in strips:
            if not self.height:
                self.channels, self.width = strip.shape[1], strip.shape[3]
                self.moments = _Moments(self.channels, strip.device)
            self.moments.add(strip)
            self.height += strip.shape[2]
            pending.append(strip)
            if sum(part.nbytes for part in pending) >= CHUNK_BYTES:
                self._join(pending)
        if pending:
            self._join(pending)

    def _join(self, strips: list[Tensor]) -> None:
        self.chunks.append(torch.cat(strips, dim=2))
        self.ends.append(self.height)
        strips.clear()

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last)."""
        found, start = [], 0
        for chunk, end in zip(self.chunks, self.ends):
            if start < last and end > first:
                assert chunk is not None, "rows were let go before their last use"
                found.append(chunk[:, :, max(first - start, 0) : last - start])
            start = end
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def forget(self, before: int) -> None:
        """Let go of chunks that end at or above this row."""
        self.chunks = [None if end <= before else chunk for chunk, end in zip(self.chunks, self.ends)]

    def through(self, layer: Layer, rows: int, halo: int, up: int = 1, down: int = 1, keep: bool = False) -> Iterator[Tensor]:
        """`layer` over `rows` rows at a time, each seen with `halo` rows more on either side whose results are cut off.

        `up`, `down`: factors by which the layer changes the height. Unless `keep`, rows are let go after their last use.
        """
        rows += -rows % down
        halo += -halo % down
        for first in range(0, self.height, rows):
            last = min(first + rows, self.height)
            top = max(first - halo, 0)
            out = layer(self.rows(top, min(last + halo, self.height)))
            yield laid_out(out[:, :, (first - top) * up // down :][:, :, : (last - first) * up // down])
            if not keep:
                self.forget(last - halo)


def _step(layer: nn.Module, x: _Activation, bits_1Chw: Tensor | None, rows: int | None) -> Iterator[Tensor]:
    """One layer of `Encoder.layers()` or `Decoder.layers()` over all strips."""
    if rows is None:
        widths = [m.out_channels for m in layer.modules() if isinstance(m, nn.Conv2d)]
        rows = max(MIN_ROWS, STRIP_ELEMENTS // (x.width * max(widths, default=x.channels)))
    if isinstance(layer, ResBlock):
        return _res_block(layer, x, rows)
    if isinstance(layer, Upsample):
        return x.through(layer, rows, halo=1, up=2)
    if isinstance(layer, AdaptiveGroupNorm):
        assert bits_1Chw is not None
        normalise, (gamma_1c11, beta_1c11) = x.moments.normaliser(layer.norm), layer.modulation(bits_1Chw)
        return x.through(lambda strip: normalise(strip) * gamma_1c11 + beta_1c11, rows, halo=0)
    assert isinstance(layer, nn.Conv2d)
    return x.through(layer, rows, halo=layer.padding[0], down=layer.stride[0])


def _res_block(block: ResBlock, x: _Activation, rows: int) -> Iterator[Tensor]:
    normalise1 = x.moments.normaliser(block.norm1)

    def first_half(strip: Tensor) -> Tensor:
        return block.conv1(F.silu(normalise1(strip), inplace=True))

    inner = _Moments(block.conv1.out_channels, x.moments.device)
    for strip in x.through(first_half, rows, halo=1, keep=True):
        inner.add(strip)
    normalise2 = inner.normaliser(block.norm2)

    def both_halves(strip: Tensor) -> Tensor:
        y = block.conv2(F.silu(normalise2(first_half(strip)), inplace=True))
        return y.add_(strip if block.nin_shortcut is None else block.nin_shortcut(strip))

    return x.through(both_halves, rows, halo=2)


def _network(network: Encoder | Decoder, start_1cHW: Tensor, bits_1Chw: Tensor | None, rows: int | None) -> Tensor:
    if rows is not None and rows < 1:
        raise ValueError(f"rows = {rows}; a strip has at least 1 row")
    x = _Activation([laid_out(start_1cHW)])
    for layer in network.layers():
        x = _Activation(_step(layer, x, bits_1Chw, rows))
    normalise = x.moments.normaliser(network.norm_out)
    rows = rows or max(MIN_ROWS, STRIP_ELEMENTS // (x.width * x.channels))
    halo = network.conv_out.padding[0]
    last = x.through(lambda strip: network.conv_out(F.silu(normalise(strip), inplace=True)), rows, halo)
    return torch.cat(list(last), dim=2)


@torch.no_grad()
def encode_in_strips(encoder: Encoder, images_B3HW: Tensor, rows: int | None = None) -> Tensor:
    """`encoder(images_B3HW)`, latents (B,C,h,w), in the memory of one activation of one picture; no gradient.

    Equals the whole picture to 1e-4 in float32. `rows` per strip of every layer; by default strips have about
    two million numbers and at least 16 rows.
    """
    return torch.cat([_network(encoder, image[None], None, rows) for image in images_B3HW])


@torch.no_grad()
def decode_in_strips(decoder: Decoder, bits_BChw: Tensor, noise_BChw: Tensor | None = None, rows: int | None = None) -> Tensor:
    """`decoder(bits_BChw, noise_BChw)`, images (B,3,H,W), in the memory of one activation of one picture; no gradient.

    Equals the whole picture to 1e-4 in float32. `rows` as for `encode_in_strips`.
    """
    start_BcHW = decoder.start(bits_BChw, noise_BChw)
    return torch.cat([_network(decoder, start[None], bits[None], rows) for start, bits in zip(start_BcHW, bits_BChw)])


def decoding_bytes(config: TokenizerConfig, height: int, width: int, itemsize: int, strips: bool) -> int:
    """About what decoding one picture takes beside the weights, in bytes: whole, or in strips.

    In activations of the picture's size, the widest convolution and a part that stops growing, all measured on a CPU with oneDNN.
    """
    activation = config.ch * height * width * itemsize
    fixed = min(8 * activation, 100_000_000)
    if not strips:
        return int(5.2 * activation) + fixed
    widest = config.ch * max(config.ch_mult)
    return int(1.75 * activation) + fixed + 5 * 4 * 9 * widest**2


__all__ = ["decode_in_strips", "decoding_bytes", "encode_in_strips"]
