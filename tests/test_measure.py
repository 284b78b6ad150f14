"""The figures that the guides quote are computed as their docstrings say."""

import pytest
import torch
from PIL import Image, ImageDraw

from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from stages.data.captions import PALETTE
from stages.measure.prompts import background_of
from stages.measure.reconstruction import measure_tokenizer, to_levels


@pytest.mark.parametrize("name", PALETTE)
def test_background_is_read_from_the_border_whatever_is_drawn_inside(name):
    picture = Image.new("RGB", (64, 64), PALETTE[name])
    draw = ImageDraw.Draw(picture)
    draw.ellipse((6, 6, 58, 58), fill=(255 - PALETTE[name][0], 90, 200))
    draw.line((0, 30, 63, 34), fill=(1, 2, 3))  # touches the border on both sides
    assert background_of(picture) == name


class _Fixed(LFQTokenizer):
    """Reconstructs every picture with a known error."""

    def decode(self, bits_BChw, generator=None):
        return self.answer[: len(bits_BChw)]


def test_psnr_is_the_mean_over_pictures_of_eight_bit_errors():
    tokenizer = _Fixed(TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8))
    images = torch.zeros(2, 3, 8, 8)
    levels = to_levels(images)
    off = torch.stack([levels[0] + 10, levels[1] + 20])
    tokenizer.answer = (off - 128 + 0.5) / 127.5
    figures = measure_tokenizer(tokenizer, images)
    expected = sum(20 * torch.log10(torch.tensor(255.0 / error)) for error in (10, 20)) / 2
    assert figures["psnr"] == pytest.approx(float(expected), abs=1e-4)


def test_bit_entropy_counts_how_often_each_bit_is_set():
    tokenizer = _Fixed(TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8))
    bits = -torch.ones(4, 8, 2, 2)
    bits[:2, 0] = 1  # bit 0 is used half of the time: one bit; bit 1 a quarter; the others never
    bits[:1, 1] = 1
    tokenizer.encode = lambda images: bits
    tokenizer.answer = torch.zeros(4, 3, 4, 4)
    figures = measure_tokenizer(tokenizer, torch.zeros(4, 3, 4, 4))
    quarter = 0.25 * 2 + 0.75 * 0.41503749927884376
    assert figures["bit_entropy"] == pytest.approx((1 + quarter) / 8, abs=1e-9)
    assert figures["dead_bits"] == 6
