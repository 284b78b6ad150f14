"""The binary diffusion head: shape of its weights, what it may and may not depend on, its loss."""

import dataclasses

import pytest
import torch
from golden_cases import GOLDEN

from bitdance.heads.diffusion.flow import draw_time, interpolate
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from lfq_tokenizer.weights import read_shapes

SMALL = HeadConfig(ch_target=8, ch_cond=64, ch_latent=256, depth_latent=4, depth_adanln=2, parallel_num=4)


def random_head(config=SMALL, seed=0):
    """All weights random, also those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    head = BinaryDiffusionHead(config, generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return head


def inputs(rows=3, config=SMALL, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, config.parallel_num, config.ch_target, generator=generator)
    cond = torch.randn(rows, config.parallel_num, config.ch_cond, generator=generator)
    return x, torch.rand(rows, generator=generator), cond


def test_published_14b_head_has_its_parameter_count():
    config = HeadConfig(32, 5120, 5120, depth_latent=6, depth_adanln=2, parallel_num=64, use_swiglu=True)
    with torch.device("meta"):
        head = BinaryDiffusionHead(config)
    assert sum(p.numel() for p in head.parameters()) == 1_758_464_032


def test_names_and_shapes_are_the_published_ones():
    config = HeadConfig(8, 64, 128, depth_latent=2, depth_adanln=2, parallel_num=4)
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in BinaryDiffusionHead(config).state_dict().items()}
    assert ours == read_shapes(GOLDEN / "t2i_ckpt" / "vision_head.safetensors")


def test_the_variant_without_swiglu_has_the_published_names():
    with torch.device("meta"):
        ours = BinaryDiffusionHead(dataclasses.replace(SMALL, use_swiglu=False)).state_dict()
    assert ours["net.res_blocks.3.mlp.0.weight"].shape == (384, 256)
    assert ours["net.res_blocks.3.mlp.2.weight"].shape == (256, 384)
    assert not any(".w1." in name or ".w2." in name for name in ours)


def test_fresh_heads_predict_zero_and_follow_their_generator():
    x, t, cond = inputs()
    first, again, other = (BinaryDiffusionHead(SMALL, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first(x, t, cond), torch.zeros_like(x))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.net.input_proj.weight, other.net.input_proj.weight)


def test_rows_are_independent_and_tokens_have_no_order():
    head, (x, t, cond) = random_head(), inputs()
    with torch.no_grad():
        out = head(x, t, cond)
        torch.testing.assert_close(head(x[1:2], t[1:2], cond[1:2]), out[1:2], rtol=0, atol=1e-5)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(head(x[:, order], t, cond[:, order]), out[:, order], rtol=0, atol=1e-5)
        changed = x.clone()
        changed[0, 3] += 1
        moved = (head(changed, t, cond) - out).abs().amax(dim=-1)
    assert moved[0].min() > 1e-4, "every token of a block sees every other"
    assert moved[1:].max() == 0


def test_one_common_time_and_shared_noise_equal_the_plain_call():
    head, (x, _, cond) = random_head(), inputs(rows=4)
    with torch.no_grad():
        plain = head(x[:2].repeat(2, 1, 1), torch.full((4,), 0.3), cond)
        shared = head.denoise(x[:2], head.embed_time(0.3), head.prepare(cond))
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)


def test_output_depends_on_time_and_condition():
    head, (x, t, cond) = random_head(), inputs()
    with torch.no_grad():
        out = head(x, t, cond)
        assert (head(x, t + 0.1, cond) - out).abs().max() > 1e-4
        assert (head(x, t, cond + 0.1) - out).abs().max() > 1e-4
    assert out.abs().max() < 1


def test_loss_is_the_velocity_error_with_times_drawn_before_noise():
    config = dataclasses.replace(SMALL, P_mean=-0.8, P_std=0.8, time_shift=2.0)
    head, (x, _, cond) = random_head(config), inputs(rows=5)
    bits = x.sign()
    with torch.no_grad():
        loss_KP = head.loss(bits, cond, torch.Generator().manual_seed(7))
        generator = torch.Generator().manual_seed(7)
        t = draw_time(5, "logit_normal", -0.8, 0.8, 2.0, generator)
        noise = torch.randn(bits.shape, generator=generator)
        x_hat = head(interpolate(bits, noise, t[:, None, None]), t, cond)
    expected = ((bits - x_hat) / (1 - t).clamp(min=0.05)[:, None, None]).square().mean(dim=-1)
    assert loss_KP.shape == (5, 4)
    torch.testing.assert_close(loss_KP, expected, rtol=1e-4, atol=1e-5)


def test_repeats_draw_further_noise_for_the_same_blocks():
    config = dataclasses.replace(SMALL, diff_batch_mul=3)
    head, (x, _, cond) = random_head(config), inputs(rows=2)
    plain = random_head(SMALL)
    loss = head.loss(x.sign(), cond, torch.Generator().manual_seed(7))
    repeated = plain.loss(x.sign().repeat(3, 1, 1), cond.repeat(3, 1, 1), torch.Generator().manual_seed(7))
    assert loss.shape == (6, 4)
    torch.testing.assert_close(loss, repeated)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        head, (x, _, cond) = random_head(dataclasses.replace(SMALL, grad_checkpointing=flag)).train(), inputs()
        head.loss(x.sign(), cond, torch.Generator().manual_seed(7)).mean().backward()
        gradients.append([p.grad for p in head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch_latent": 192}, "multiple of 128"),
        ({"ch_latent": 64}, "multiple of 128"),
        ({"depth_adanln": 3}, "no multiple of depth_adanln"),
        ({"depth_adanln": 0}, "a whole number from 1 to"),
        ({"ch_target": True}, "a whole number from 1 to"),
        ({"time_schedule": "cosine"}, "logit_normal, uniform"),
        ({"time_shift": 0.0}, "above 0, up to"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_config_json_comes_back_and_unknown_keys_are_errors():
    assert HeadConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ValueError, match="unknown keys 'ch_latnet'"):
        HeadConfig.from_dict({**SMALL.to_dict(), "ch_latnet": 1})
    with pytest.raises(ValueError, match=r"lacks \['ch_target'\]"):
        HeadConfig.from_dict({k: v for k, v in SMALL.to_dict().items() if k != "ch_target"})


def test_half_precision_weights_predict_in_float32():
    head, (x, t, cond) = random_head(), inputs()
    with torch.no_grad():
        full, half = head(x, t, cond), head.to(torch.bfloat16)(x, t, cond)
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 0.05
