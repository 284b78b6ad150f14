"""Parity with the published class-conditional models: loss, gradients, sampling, heads, layouts (PARITY.md)."""

import pytest
import torch
from class_model import KINDS, golden_model, golden_tokenizer
from golden_cases import case, close, meta
from test_parity_generation import synthetic

from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.flow import warp_time
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.heads.diffusion.sampler import SAMPLERS, euler_maruyama
from bitdance.heads.diffusion.settings import Sampling
from bitdance.kinds.class_patch.generate import generate_bits
from bitdance.kinds.class_patch.noise import ClassNoise
from bitdance.kinds.class_patch.rotary import turns
from bitdance.kinds.class_patch.settings import ClassSettings
from bitdance.networks.rotary import rotate
from bitdance.sequence.patches import PatchPlan
from lfq_tokenizer.weights import load_strict

NAMES = meta()["cases"]
LOSSES = tuple(name for name in NAMES if name.startswith("imagenet_") and "/loss_" in name)
SAMPLES = tuple(name for name in NAMES if name.startswith("imagenet_") and "/sample_" in name)
HEADS, LAYOUTS = "imagenet_head/synth", "imagenet_fn"


def recorded_draws(t, config, training, p_max, p_drop):
    rest = [t[f"draw{i}"] for i in range(4) if f"draw{i}" in t]
    flipped = dropped = None
    if training:
        (r1, r2), dropped = rest[0], rest[1][0] < p_drop
        flipped, rest = r1 < p_max * r2, rest[2:]
        flipped = config.plan.order(flipped) if flipped.ndim == 4 else flipped
    time, noise = rest[0][0], rest[1][0]
    c = config
    times = warp_time(time, c.time_schedule, c.P_mean, c.P_std, c.time_shift)
    return ClassNoise(times, noise if noise.ndim == 3 else noise[:, None], flipped, dropped)


@pytest.mark.parametrize("name", LOSSES)
def test_training_loss_and_gradients_match_published(name):
    info, t = case(name)
    model = golden_model(KINDS[info["kind"]], info["parallel_mode"])
    model.zero_grad()
    bits = t["in.bits"].float() if info["cached"] else golden_tokenizer().encode(t["in.image"])
    draws = recorded_draws(t, model.config, info["train"], info["perturb_rate"], info["class_dropout_prob"])
    (loss_KP,) = model.losses(bits, t["in.class_id"], draws).values()
    assert loss_KP.shape == draws.noise_KPC.shape[:2]
    torch.testing.assert_close(loss_KP.mean(), t["out.loss"], rtol=1e-5, atol=1e-5)
    loss_KP.mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, expected in t.items():
        if key.startswith("out.grad."):
            torch.testing.assert_close(gradients[key.removeprefix("out.grad.")], expected, rtol=1e-4, atol=1e-4)
    recorded = {key: norm for key, norm in info["grad_norms"].items() if not key.startswith("vae.")}
    assert set(recorded) == set(gradients)
    for key, norm in recorded.items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-4), key


@pytest.mark.parametrize("name", SAMPLES)
def test_sampling_matches_published(name, monkeypatch):
    info, t = case(name)
    model = golden_model(KINDS[info["kind"]], info["parallel_mode"])
    draws = iter([draw for i in range(2) if f"draw{i}" in t for draw in t[f"draw{i}"]])
    conditions, predictions = [], []
    prepare = model.head.prepare
    monkeypatch.setattr(model.head, "prepare", lambda cond: conditions.append(cond) or prepare(cond))

    def recording(*args):
        predictions.append(euler_maruyama(*args))
        return predictions[-1]

    def noise(rows):
        draw = next(draws)
        assert len(draw) == rows
        return draw.reshape(rows, -1, model.config.latent_dim)

    monkeypatch.setitem(SAMPLERS, "euler_maruyama", recording)
    classes = t["in.class_id"].tolist()
    bits_BChw = generate_bits(
        model,
        classes,
        ClassSettings(Sampling(info["sample_steps"], info["cfg_scale"]), info["cfg_schedule"]),
        [torch.Generator() for _ in classes],
        noise=noise,
    )
    assert next(draws, None) is None, "more draws were recorded than taken"
    assert torch.equal(bits_BChw, t["out.bits"].float())
    expected = t["out.head_cond_first2"]
    close(torch.stack(conditions[:2]).reshape(expected.shape), expected, 5e-5)
    assert len(predictions) == len(t["out.pred"]) == model.config.num_blocks
    for ours, published in zip(predictions, t["out.pred"]):
        close(ours.reshape(len(ours), *published.shape[1:]), published[: len(ours)], 1e-3)
    with torch.no_grad():
        image = golden_tokenizer().decode(bits_BChw)
    close(image[:, :, ::4, ::4], t["out.image_sub4"], 1e-4)


def synthetic_head(config: HeadConfig) -> BinaryDiffusionHead:
    head = BinaryDiffusionHead(config)
    load_strict(head.net, synthetic({name: tensor.shape for name, tensor in head.net.state_dict().items()}), "synthetic weights")
    return head.eval()


def test_both_heads_match_published():
    info, t = case(HEADS)
    for key, P, head_dim, draws in (("mlp", 1, 0, t["draw0"][:, :, None]), ("trans", 4, 64, t["draw1"])):
        fields = {name: value for name, value in info[key].items() if name != "n_head"}
        head = synthetic_head(HeadConfig(**fields, parallel_num=P, head_dim=head_dim, squash=False))
        x, c = t["in.x"][:, :P], t["in.c"][:, :P]
        with torch.no_grad():
            close(head(x, t["in.t"], c).reshape(t[f"out.{key}"].shape), t[f"out.{key}"], 1e-5)
            sampled = sampled_with(head, c, iter(draws))
        expected = t[f"out.sample_{key}"]
        close(sampled.reshape(-1, *expected.shape[1:]), expected[: len(sampled)], 1e-3)


def sampled_with(head, c, draws):
    noise = torch.stack(list(draws))
    return BlockSampler(head)(c, noise, Sampling(len(noise) - 1, 4.0), len(noise) - 1)


def test_layouts_match_published():
    """Orders, rotary positions and mask. Ours has one order function, so the published four are views of it."""
    _, t = case(LAYOUTS)
    x, plan, raster = t["in.x"], PatchPlan(4, 4, 2), PatchPlan(4, 4, 1)
    assert torch.equal(plan.order(x), t["out.patchify_raster_p2"])
    assert torch.equal(plan.unorder(t["out.patchify_raster_p2"]), t["out.unpatchify_raster"])
    channels_first = plan.order(x).unflatten(1, (4, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(channels_first, t["out.patchify_p2"])
    assert torch.equal(t["out.unpatchify_p2"], x)

    row, col = raster.coordinates()
    assert torch.equal(torch.stack([col, row], dim=-1) + 0.5, t["out.pos_2d"])
    close(turns(row, col, 2, 16), t["out.freqs_cis"], 1e-6)
    close(turns(*plan.coordinates(), 0, 16), t["out.freqs_patch"], 1e-6)
    close(rotate(t["in.q"].transpose(1, 2), turns(row, col, 2, 16)).transpose(1, 2), t["out.rotary"], 1e-6)
    mask = golden_model(4).block_mask(19)[0, 0]
    assert torch.equal(mask, t["out.block_mask"].bool())
