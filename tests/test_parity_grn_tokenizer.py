"""Parity with GRN's quantiser and tokenizer (tests/golden/grn)."""

import pytest
import torch
from grn_cases import close, grn_case, hbq_tokenizer

from lfq_tokenizer import binarize
from lfq_tokenizer.hierarchical import HierarchicalQuantizer, hierarchical_bits, hierarchical_values

ENCODES = ("tokenizer/encode", "tokenizer/encode_rect")
DECODES = ("tokenizer/decode", "tokenizer/decode_rect")


def bits_of(index, rounds):
    """Index (B,C,h,w) → bits (B,rounds·C,h,w) in ±1, the highest first."""
    return torch.cat([(index >> (rounds - 1 - j) & 1) * 2.0 - 1 for j in range(rounds)], dim=1)


@pytest.mark.parametrize("M", [1, 2, 3, 4, 8])
def test_bits_and_values_are_the_recorded_ones(M):
    _, t = grn_case("hbq")
    bits = hierarchical_bits(t["in.x"], M)
    assert torch.equal((bits > 0).long(), t[f"out.bits_M{M}"])
    assert torch.equal(bits, bits_of(t[f"out.index_M{M}"], M))
    values = hierarchical_values(bits, M)
    assert torch.equal(values, t[f"out.values_M{M}"])
    assert (values - t["in.x"].clamp(-1, 1)).abs().max() <= 2.0**-M
    assert torch.equal(hierarchical_bits(values, M), bits)


def test_one_round_is_the_sign():
    z = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    z[0, 0] = torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    assert torch.equal(hierarchical_bits(z, 1), binarize(z))
    values, losses = HierarchicalQuantizer(5, 1)(z)
    torch.testing.assert_close(values, binarize(z) / 2)
    assert losses.terms.keys() == {"commitment"} and losses.entropy == 0.0


def test_the_gradient_goes_straight_through_to_the_tanh():
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    values, _ = HierarchicalQuantizer(3, 3)(z)
    values.sum().backward()
    torch.testing.assert_close(z.grad, 1 - z.detach().tanh() ** 2)


@pytest.mark.parametrize("name", ENCODES)
@torch.no_grad()
def test_encoding_matches_the_published_tokenizer(name):
    info, t = grn_case(name)
    tokenizer = hbq_tokenizer()
    close(tokenizer.encoder(t["in.image"]), t["out.encoder_out"])
    close(tokenizer.latents(t["in.image"]), t["out.features"])
    bits = tokenizer.encode(t["in.image"])
    assert torch.equal((bits > 0).long(), t["out.bits"])
    assert torch.equal(bits, bits_of(t["out.index"], info["hbq_round"]))


@pytest.mark.parametrize("name", DECODES)
@torch.no_grad()
def test_decoding_matches_the_published_tokenizer(name):
    info, t = grn_case(name)
    bits = bits_of(t["in.index"], info["hbq_round"])
    assert torch.equal(hierarchical_values(bits, info["hbq_round"]), t["out.features"])
    image = hbq_tokenizer().decode(bits)
    close(image, t["out.image"])
    if "out.image_uint8_round" in t:
        rounded = ((image + 1) * 127.5).clamp(0, 255).round()
        assert (rounded - t["out.image_uint8_round"]).abs().max() <= 1
