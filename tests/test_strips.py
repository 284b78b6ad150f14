"""A picture in strips is the picture as a whole, in the memory of one activation."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lfq_tokenizer.strips as strips_module
import lfq_tokenizer.tokenizer as tokenizer_module
from lfq_tokenizer import LFQTokenizer, TokenizerConfig, binarize
from lfq_tokenizer.strips import decode_in_strips, encode_in_strips

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "plain": TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8),
    "generative": TokenizerConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, gan_decoder=True),
    "narrowing": TokenizerConfig(ch=32, ch_mult=(2, 1, 2), num_res_blocks=2, z_channels=5),
    "one level": TokenizerConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=4, gan_decoder=True),
}
ROWS = [1, 2, 7, 1000, None]


def tokenizer(name: str, dtype: torch.dtype = torch.float32) -> LFQTokenizer:
    """Weights that keep activations near 1 and that are nowhere at their starting values."""
    found, generator = LFQTokenizer(CONFIGS[name]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + 0.3 * (parameter.ndim == 1))
    return found.eval().to(dtype)


def images(B: int, H: int, W: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dark and calm above, bright and busy below: statistics of a strip are not those of the picture."""
    noise = torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ramp = torch.linspace(0, 1, H, dtype=torch.float64)[:, None]
    return (noise * ramp + ramp - 1 + 0.1 * torch.arange(B)[:, None, None, None]).to(dtype)


def bits_and_noise(name: str, B: int, h: int, w: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    shape = (B, CONFIGS[name].z_channels, h, w)
    bits = torch.where(torch.rand(shape, generator=generator) < torch.linspace(0.1, 0.9, h)[:, None], 1.0, -1.0).to(dtype)
    noise = torch.randn(shape, generator=generator).to(dtype) if CONFIGS[name].gan_decoder else None
    return bits, noise


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encoding_in_strips_is_encoding_the_whole(name, rows):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        encoder, x = tokenizer(name, dtype).encoder, images(2, 28, 12, dtype)
        whole, strips = encoder(x), encode_in_strips(encoder, x, rows)
        assert whole.std() > 0.1 and strips.dtype == dtype
        torch.testing.assert_close(strips, whole, rtol=0, atol=tolerance)
        sure = whole.abs() > tolerance
        assert torch.equal(binarize(strips)[sure], binarize(whole)[sure])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_in_strips_is_decoding_the_whole(name, rows):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        decoder, (bits, noise) = tokenizer(name, dtype).decoder, bits_and_noise(name, 2, 7, 3, dtype)
        whole, strips = decoder(bits, noise), decode_in_strips(decoder, bits, noise, rows)
        assert whole.std() > 0.1 and strips.dtype == dtype
        torch.testing.assert_close(strips, whole, rtol=0, atol=tolerance)


@torch.no_grad()
def test_an_activation_of_many_chunks_is_the_whole(monkeypatch):
    monkeypatch.setattr(strips_module, "CHUNK_BYTES", 20_000)  # several strips each
    monkeypatch.setattr(strips_module, "STRIP_ELEMENTS", 2_000)
    monkeypatch.setattr(strips_module, "MIN_ROWS", 3)
    found, x = tokenizer("generative", torch.float64), images(1, 64, 12, torch.float64)
    whole = found.encoder(x)
    torch.testing.assert_close(encode_in_strips(found.encoder, x), whole, rtol=0, atol=1e-11)
    bits, noise = bits_and_noise("generative", 1, 32, 6, torch.float64)
    torch.testing.assert_close(decode_in_strips(found.decoder, bits, noise), found.decoder(bits, noise), rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_strip_alone_would_give_something_else():
    encoder, x = tokenizer("plain").encoder, images(1, 36, 20)
    alone = torch.cat([encoder(part) for part in x.split(12, dim=2)], dim=2)
    assert (alone - encoder(x)).abs().max() > 0.1


@torch.no_grad()
def test_activations_far_from_zero_keep_their_spread():
    encoder, x = tokenizer("plain").encoder, images(1, 32, 16)
    encoder.conv_in.weight.mul_(0.01)
    encoder.down[0].block[0].nin_shortcut = torch.nn.Conv2d(32, 32, 1)  # a skip with a bias shifts what norm_out reads
    torch.nn.init.dirac_(encoder.down[0].block[0].nin_shortcut.weight)
    encoder.down[0].block[0].nin_shortcut.bias.fill_(100.0)
    torch.testing.assert_close(encode_in_strips(encoder, x, 3), encoder(x), rtol=0, atol=1e-3)
    exact = encoder.double()(x.double())
    torch.testing.assert_close(encode_in_strips(encoder, x.double(), 3), exact, rtol=0, atol=1e-9)


@torch.no_grad()
def test_in_half_precision_strips_err_no_more_than_the_whole():
    x = images(1, 64, 32)
    exact = tokenizer("plain").encoder(x)
    encoder = tokenizer("plain", torch.bfloat16).encoder
    strips = encode_in_strips(encoder, x.bfloat16(), 7)
    assert strips.dtype == torch.bfloat16
    errors = [(found.float() - exact).square().mean().sqrt() for found in (strips, encoder(x.bfloat16()))]
    assert errors[0] < 1.2 * errors[1]


def test_strips_carry_no_gradient_and_leave_the_input_alone():
    found, x = tokenizer("plain"), images(1, 16, 8)
    before = x.clone()
    assert not encode_in_strips(found.encoder, x.requires_grad_(), 3).requires_grad
    assert torch.equal(x, before)


def test_a_strip_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="rows = 0"):
        encode_in_strips(tokenizer("plain").encoder, images(1, 16, 8), 0)


# the tokenizer chooses


@pytest.fixture
def calls(monkeypatch):
    """Which of the two functions the tokenizer calls."""
    made: list[str] = []
    for name, function in (("encode_in_strips", encode_in_strips), ("decode_in_strips", decode_in_strips)):
        monkeypatch.setattr(tokenizer_module, name, lambda *a, name=name, function=function: made.append(name) or function(*a))
    return made


def test_published_sizes_stay_whole_and_large_ones_do_not():
    assert 1024 * 1024 * 1.1 < tokenizer("plain").strip_pixels < 2048 * 2048


@pytest.mark.parametrize("name", ["plain", "generative"])
@torch.no_grad()
def test_only_pictures_above_the_limit_go_in_strips(name, calls):
    found, x = tokenizer(name), images(2, 16, 12)
    found.strip_pixels = 16 * 12  # of one picture, not of the batch
    bits = found.encode(x)
    whole = found.decode(bits, torch.Generator().manual_seed(0))
    assert calls == []
    found.strip_pixels -= 1
    assert torch.equal(found.encode(x), bits)
    strips = found.decode(bits, torch.Generator().manual_seed(0))
    assert calls == ["encode_in_strips", "decode_in_strips"]
    torch.testing.assert_close(strips, whole, rtol=0, atol=1e-4)


def test_where_a_gradient_is_wanted_the_decoder_sees_the_whole(calls):
    found, (bits, _) = tokenizer("plain"), bits_and_noise("plain", 1, 8, 6, torch.float32)
    found.strip_pixels = 10
    with pytest.warns(UserWarning, match="whole to keep its gradient"):
        found.decode(bits).sum().backward()
    assert found.decoder.conv_in.weight.grad is not None and calls == []
    found.requires_grad_(False)
    with pytest.warns(UserWarning, match="whole to keep its gradient"):
        assert found.decode(bits.requires_grad_()).requires_grad
    assert calls == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.decode(bits.detach())
        found.encode(images(1, 16, 12))
    assert calls == ["decode_in_strips", "encode_in_strips"]


def test_a_nan_in_one_pixel_of_a_large_picture_is_an_error(calls):
    found, x = tokenizer("plain"), images(1, 64, 12)
    found.strip_pixels = 10
    x[0, 1, 40, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        found.encode(x)
    assert calls == ["encode_in_strips"]


# memory

MEMORY = """
import json, torch
from lfq_tokenizer import LFQTokenizer, TokenizerConfig, strips
strips.CHUNK_BYTES, strips.STRIP_ELEMENTS = 2**23, 2**18  # in proportion to a picture that is not really large
torch.set_num_threads(1)
torch.set_grad_enabled(False)
tokenizer = LFQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8))
images = torch.rand(1, 3, 768, 512)
def peak():  # of this program; what getrusage reports starts at the peak of the process that started it
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6
tokenizer.decode(tokenizer.encode(images[:, :, :64, :64]))
found = [peak()]
for tokenizer.strip_pixels in (0, 2**30):  # in strips first: a peak never falls
    tokenizer.decode(tokenizer.encode(images))
    found.append(peak())
print(json.dumps(found))
"""


def test_strips_need_less_than_half_the_memory():
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak memory of a process is read from /proc, which this system lacks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True)
    start, strips, whole = json.loads(out.stdout)
    activation = 32 * 768 * 512 * 4 / 1e6
    assert whole - start > 3 * activation, (start, strips, whole)
    assert strips - start < 0.5 * (whole - start), (start, strips, whole)
