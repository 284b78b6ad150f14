"""Numbers become bits in one place, the entropy is that of the whole table of codes, and files come back as they were."""

import itertools
import json
import math

import pytest
import torch
from torch import Tensor

from lfq_tokenizer import LFQTokenizer, LookupFreeQuantizer, TokenizerConfig, binarize
from lfq_tokenizer.blocks import group_norm
from lfq_tokenizer.entropy import LOG_EPSILON, MAX_BITS_PER_GROUP, group_entropy

TINY = TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tiny(seed: int = 0, **changes) -> LFQTokenizer:
    config = TokenizerConfig(**{**{f: getattr(TINY, f) for f in TINY.__dataclass_fields__}, **changes})
    tokenizer, generator = LFQTokenizer(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tokenizer.parameters():  # also those that training starts at zero
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return tokenizer.eval()


def images(B: int = 2, H: int = 8, W: int = 12) -> Tensor:
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(1)) * 2 - 1


# binarize


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_of_either_sign_is_minus_one_and_the_smallest_number_is_plus_one(dtype):
    smallest = torch.finfo(dtype).smallest_normal / 2  # denormal
    z = torch.tensor([1.5, -1.5, 0.0, -0.0, smallest, -smallest, math.inf, -math.inf], dtype=dtype)
    bits = binarize(z)
    assert z[4] > 0
    assert bits.dtype == dtype and bits.shape == z.shape
    assert bits.tolist() == [1, -1, -1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_never_becomes_a_bit(dtype):
    z = torch.ones(2, 3, dtype=dtype)
    z[1, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 6 values are NaN"):
        binarize(z)


def test_the_encoder_uses_that_rule():
    tokenizer = tiny()
    with torch.no_grad():
        tokenizer.encoder.conv_out.weight.zero_()
        tokenizer.encoder.conv_out.bias.copy_(torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1, -1, 0, 2]))
        bits = tokenizer.encode(images())
    assert bits[0, :, 0, 0].tolist() == [-1, -1, 1, -1, 1, -1, -1, 1]


# entropy


def brute_force(z_BChw: Tensor, groups: int, temperature: float, pool_groups: bool) -> tuple[Tensor, Tensor]:
    """The definition, with the whole table of codes, in float64."""
    k = z_BChw.shape[1] // groups
    codes_Qk = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=k)), dtype=torch.float64)
    z_NGk = z_BChw.double().permute(0, 2, 3, 1).reshape(-1, groups, k)
    log_NGQ = torch.log_softmax(2 * z_NGk @ codes_Qk.T / temperature, dim=-1)
    probability_NGQ = log_NGQ.exp()
    per_sample = -(probability_NGQ * log_NGQ).sum(-1).mean()
    mean_GQ = probability_NGQ.mean(0)
    if pool_groups:
        mean_GQ = mean_GQ.mean(0, keepdim=True)
    return per_sample, -(mean_GQ * torch.log(mean_GQ + LOG_EPSILON)).sum(-1).mean()


@pytest.mark.parametrize("pool_groups", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize(("dim", "groups"), [(8, 1), (8, 2), (8, 4), (8, 8), (9, 3), (7, 1)])
def test_entropy_and_its_gradient_equal_brute_force_over_all_codes(dim, groups, temperature, pool_groups):
    generator = torch.Generator().manual_seed(dim * groups)
    # Between certain and undecided; off centre, where the gradient is no difference of two nearly equal numbers.
    z = 0.5 * temperature * (torch.randn(3, dim, 2, 3, generator=generator) + 0.4)
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    found = group_entropy(ours, groups, temperature, pool_groups)
    expected = brute_force(theirs, groups, temperature, pool_groups)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(value, ours, retain_graph=True)
        (reference,) = torch.autograd.grad(wanted, theirs, retain_graph=True)
        largest = float(reference.abs().max())
        assert largest > 0
        torch.testing.assert_close(gradient.double() / largest, reference / largest, rtol=0, atol=1e-5)


def test_groups_of_one_bit_have_the_closed_form():
    z = 0.01 * torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(4 * z.double() / 0.01)
    per_bit = -(p * p.log() + (1 - p) * (1 - p).log())
    up = p.mean((0, 2, 3))
    of_mean = -(up * torch.log(up + LOG_EPSILON) + (1 - up) * torch.log(1 - up + LOG_EPSILON))
    found = group_entropy(z, 6, 0.01, pool_groups=False)
    torch.testing.assert_close(found[0].double(), per_bit.mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), of_mean.mean(), rtol=1e-6, atol=1e-6)


def test_every_code_used_once_and_surely_gives_zero_and_all_bits():
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8))).view(1, 16, 16, 8).permute(0, 3, 1, 2)
    per_sample, of_mean = group_entropy(codes, 1)
    assert float(per_sample) == 0
    assert float(of_mean) == pytest.approx(-math.log(2**-8 + LOG_EPSILON), abs=1e-6)


def test_the_entropy_does_not_depend_on_memory_layout_or_lose_half_precision():
    z = 0.01 * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    z = z.bfloat16().float()
    expected = group_entropy(z, 2)
    for other in (z.contiguous(memory_format=torch.channels_last), z.bfloat16()):
        for value, wanted in zip(group_entropy(other, 2), expected, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dim", "groups", "allowed"),
    [(8, 3, "[1, 2, 4, 8]"), (8, 0, "[1, 2, 4, 8]"), (8, 16, "[1, 2, 4, 8]"), (32, 1, "[2, 4, 8, 16, 32]"), (19, 1, "[19]")],
)
def test_groups_that_do_not_divide_or_have_too_many_codes_are_refused(dim, groups, allowed):
    assert MAX_BITS_PER_GROUP == 18
    for refuse in (lambda: LookupFreeQuantizer(dim, groups), lambda: group_entropy(torch.zeros(1, dim, 2, 2), groups)):
        with pytest.raises(ValueError) as caught:
            refuse()
        assert f"groups = {groups} for {dim} bits" in str(caught.value) and allowed in str(caught.value)


# quantiser


def test_the_straight_through_gradient_is_the_identity():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 8, 3, 3, generator=generator).requires_grad_()
    weight = torch.randn(z.shape, generator=generator)
    bits, _ = LookupFreeQuantizer(8, 2)(z)
    torch.testing.assert_close(bits, binarize(z.detach()), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad((bits * weight).sum(), z)
    assert torch.equal(gradient, weight)


def test_commitment_pulls_latents_to_their_own_bits():
    z = torch.tensor([0.5, -2.0, 0.0, 1.0]).view(1, 4, 1, 1).requires_grad_()
    _, losses = LookupFreeQuantizer(4, 4)(z)
    assert losses.commitment.item() == pytest.approx((0.25 + 1 + 1 + 0) / 4)
    (gradient,) = torch.autograd.grad(losses.commitment, z)
    assert gradient.flatten().tolist() == [-0.25, -0.5, 0.5, 0]


@pytest.mark.parametrize("shape", [(8, 2, 2), (1, 7, 2, 2), (1, 2, 2, 8)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 8, height, width\)"):
        LookupFreeQuantizer(8, 2)(torch.zeros(shape))


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature = 0"):
        LookupFreeQuantizer(8, 2, temperature=0)


# networks


def test_the_published_tokenizer_has_its_published_parameter_count():
    with torch.device("meta"):
        tokenizer = LFQTokenizer(TokenizerConfig())
    assert tokenizer.downsampling == 16
    assert sum(p.numel() for p in tokenizer.parameters()) == 460_294_179


def test_a_tokenizer_maps_shapes_there_and_back():
    tokenizer = tiny(ch_mult=(1, 2, 1))
    with torch.no_grad():
        bits = tokenizer.encode(images(2, 8, 12))
        out = tokenizer.decode(bits)
    assert bits.shape == (2, 8, 2, 3) and set(bits.flatten().tolist()) == {-1.0, 1.0}
    assert out.shape == (2, 3, 8, 12)


@pytest.mark.parametrize("quantizer", ["lfq", "hbq", "none"])
def test_a_token_may_be_a_patch_of_latents(quantizer):
    """The same weights, bits and pictures, in a quarter of the tokens: the four latents of a channel lie together."""
    plain = tiny(quantizer=quantizer, rounds=2 if quantizer == "hbq" else 1)
    patched = tiny(quantizer=quantizer, rounds=plain.config.rounds, patch=2)
    assert patched.downsampling == 4 and patched.config.width == 4 * plain.config.width and patched.config.stride == 2
    with torch.no_grad():
        latents, tokens = plain.encode(images(2, 8, 12)), patched.encode(images(2, 8, 12))
        assert tokens.shape == (2, 4 * plain.config.width, 2, 3)
        for c in range(plain.config.width):
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                assert torch.equal(tokens[:, 4 * c + 2 * y + x], latents[:, c, y::2, x::2])
        assert torch.equal(patched.decode(tokens), plain.decode(latents))
        one = torch.ones(1, patched.config.width, 1, 1)
        assert patched.decode(one).shape == (1, 3, 4, 4)  # four latents have a spread
    with pytest.raises(ValueError, match="multiples of 4"):
        patched.encode(images(1, 8, 6))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 7, 8), (1, 3, 8, 9), (0, 3, 8, 8), (1, 3, 0, 8)])
def test_pictures_of_a_wrong_shape_are_refused_before_any_work(shape):
    with pytest.raises(ValueError) as caught:
        tiny().encode(torch.zeros(shape))
    assert str(shape) in str(caught.value) and "multiples of 2" in str(caught.value)


@pytest.mark.parametrize("shape", [(8, 4, 4), (1, 7, 4, 4), (1, 8, 1, 1)])
def test_bits_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="bits have shape|at least 2 tokens"):
        tiny().decode(torch.ones(shape))


def test_the_generative_decoder_draws_from_the_given_generator_and_the_plain_one_draws_nothing():
    bits = binarize(torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        for generative in (True, False):
            tokenizer = tiny(gan_decoder=generative)
            generator = torch.Generator().manual_seed(5)
            before = generator.get_state()
            first = tokenizer.decode(bits, generator)
            assert torch.equal(generator.get_state(), before) is not generative
            assert torch.equal(first, tokenizer.decode(bits, torch.Generator().manual_seed(5)))
            assert torch.equal(first, tokenizer.decode(bits, torch.Generator().manual_seed(6))) is not generative


# files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_return_every_tensor_and_keep_the_dtype(tmp_path, dtype):
    tokenizer = tiny(gan_decoder=True).to(dtype)
    tokenizer.save_pretrained(tmp_path / "a" / "b")
    again = LFQTokenizer.from_pretrained(tmp_path / "a" / "b")
    assert again.config == tokenizer.config and not again.training
    mine, theirs = tokenizer.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert theirs[name].dtype == dtype and torch.equal(theirs[name], tensor)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["ae.safetensors", "ae_config.json"]
    with torch.no_grad():
        bits = tokenizer.encode(images().to(dtype))
        assert torch.equal(again.encode(images().to(dtype)), bits)
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        assert torch.equal(again.decode(bits, seeds[0]), tokenizer.decode(bits, seeds[1]))


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["ae.safetensors", "ae_config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        LFQTokenizer.from_pretrained(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 200, 0.5, -1])
def test_a_truncated_file_is_named(folder, kept):
    path = folder / "ae.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError) as caught:
        LFQTokenizer.from_pretrained(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_channels": 6}, "encoder.conv_out.weight has shape [8, 32, 1, 1], expected [6, 32, 1, 1]"),
        ({"num_res_blocks": 2}, "missing encoder.down.0.block.1.conv1.weight"),
        ({"ch_mult": (1,)}, "unexpected"),
        ({"gan_decoder": True}, "decoder.conv_in.weight has shape [32, 8, 3, 3], expected [32, 16, 3, 3]"),
    ],
)
def test_weights_of_another_shape_are_listed_with_the_file(folder, change, message):
    config = tiny(**change).config
    (folder / "ae_config.json").write_text(json.dumps(config.to_published()))
    with pytest.raises(ValueError) as caught:
        LFQTokenizer.from_pretrained(folder)
    assert str(folder / "ae.safetensors") in str(caught.value) and message in str(caught.value)
    assert str(caught.value).count(";") <= 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"ddconfig": {"ch": 32, "chanels": 3}, "gan_decoder": false}', "chanels"),
        ('{"ddconfig": {}, "gan": true}', "gan"),
        ('{"ddconfig": {"ch": 32, "num_res_blocks": 1, "z_channels": 8}}', "ch_mult"),
        ('{"ddconfig": {"ch": 33, "num_res_blocks": 1, "z_channels": 8, "ch_mult": [1]}}', "multiple of 32"),
        ('{"ddconfig": {"ch": 32, "num_res_blocks": 0, "z_channels": 8, "ch_mult": [1]}}', "num_res_blocks = 0"),
        ('{"ddconfig": {"ch": 32, "num_res_blocks": 1, "z_channels": 8, "ch_mult": []}}', "ch_mult: 0 of them"),
        ('{"ddconfig": {"ch": 32, "num_res_blocks": 1, "z_channels": 8, "ch_mult": [1], "out_ch": 4}}', "out_ch = 4"),
        ('{"ddconfig": {"ch": "32", "num_res_blocks": 1, "z_channels": 8, "ch_mult": [1]}}', ""),
        ('{"ddconfig": 3}', ""),
        ("[1, 2]", ""),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_file_and_key(folder, text, message):
    (folder / "ae_config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        LFQTokenizer.from_pretrained(folder)
    assert str(folder / "ae_config.json") in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TokenizerConfig(),
        TokenizerConfig(ch=64, ch_mult=(1, 2, 3), num_res_blocks=3, z_channels=17, gan_decoder=True),
        TokenizerConfig(ch=32, patch=2),
        TokenizerConfig(ch=32, quantizer="hbq", rounds=2, patch=4),
    ],
)
def test_a_config_survives_the_published_form(config):
    published = json.loads(json.dumps(config.to_published()))
    assert TokenizerConfig.from_published(published) == config
    assert TokenizerConfig.from_published({**published, "checkpoint": None}) == config


def test_keys_without_effect_in_published_configs_are_accepted():
    dd = {"double_z": False, "z_channels": 8, "in_channels": 3, "out_ch": 3, "resolution": 256}
    data = {"ddconfig": {**dd, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}}
    assert TokenizerConfig.from_published(data) == TINY


@pytest.mark.parametrize("gradient", [False, True])
def test_layers_keep_the_layout_that_the_network_chose(gradient):
    """Channels last where nothing is learned, first in training: from the first layer to the last, whatever comes in."""
    tokenizer = LFQTokenizer(TINY)
    layouts = []
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 3:
            module.register_forward_hook(
                lambda m, inputs, _: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    images = torch.rand(2, 16, 24, 3).permute(0, 3, 1, 2)  # as pictures are read
    with torch.set_grad_enabled(gradient):
        bits = binarize(tokenizer.encoder(images))
        made = tokenizer.decoder(bits)
    assert len(layouts) > 8 and set(layouts) == {not gradient}
    expected = tokenizer.decoder.double()(bits.contiguous().double())
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_group_norm_is_as_exact_with_the_channels_last(mean):
    norm = group_norm(64)
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 64, 96, 80, generator=generator) + mean
    expected = torch.nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.no_grad():
        found = norm(x.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 if mean == 0 else 1e-4)
