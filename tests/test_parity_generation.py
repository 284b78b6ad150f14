"""Parity with the published behaviour: time embedding, head, samplers, training loss, whole generations (PARITY.md)."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, case, close, meta

from bitdance.folder.checkpoint import load_model
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.flow import warp_time
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig, TimeEmbedding
from bitdance.heads.diffusion.sampler import SAMPLERS, euler_maruyama, guided_velocity
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.picture import to_uint8
from bitdance.pipeline import BitDancePipeline
from bitdance.sequence.patches import PatchPlan
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.weights import load_strict, read_safetensors

CHECKPOINT = GOLDEN / "t2i_ckpt"
NAMES = meta()["cases"]

HEAD_NET = ("head_net/p4", "head_net/p16", "head_net/p64", "head_net/synth")
HEAD_SAMPLE = tuple(name for name in NAMES if name.startswith("head_sample/"))
HEAD_LOSS = tuple(name for name in NAMES if name.startswith("head_loss/"))
GENERATE_API = "gen/generate_api_p4_64x64"
GEN = tuple(name for name in NAMES if name.startswith("gen/") and name != GENERATE_API)


def published_head(**changes) -> BinaryDiffusionHead:
    config = HeadConfig.from_dict(read_json(CHECKPOINT / "vision_head_config.json"))
    head = BinaryDiffusionHead(dataclasses.replace(config, **changes))
    load_strict(head, read_safetensors(CHECKPOINT / "vision_head.safetensors"), "vision_head.safetensors")
    return head


def synthetic(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The weights of the `synth` cases: a written hash of (parameter number, element number), see PARITY.md."""
    state, u64 = {}, np.uint64
    with np.errstate(over="ignore"):
        for k, name in enumerate(sorted(shapes)):
            shape = tuple(shapes[name])
            start = u64((k + 1) * 0xD1342543DE82EF95 % 2**64)
            z = np.arange(np.prod(shape), dtype=u64) * u64(0x9E3779B97F4A7C15) + start
            z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
            u = torch.from_numpy(((z ^ (z >> u64(31))) >> u64(40)).astype(np.float64) / 2**24 - 0.5).reshape(shape)
            if len(shape) == 2:
                u = u * 2.0 ** (2 - math.ceil(math.log2(math.sqrt(shape[1]))))
            else:
                u = 1 + 0.5 * u if name.endswith("weight") else 0.25 * u
            state[name] = u.float()
    return state


def test_time_embedding_matches_published():
    _, t = case("timestep_embedding")
    # float32 angles reach 1000, where neighbours lie 6e-5 apart; makers' exponentials differ in the last digit
    torch.testing.assert_close(TimeEmbedding.frequencies(t["in.t"]), t["out.out"], rtol=0, atol=7e-5)


@pytest.mark.parametrize("name", HEAD_NET[:3])
def test_head_network_matches_published(name):
    _, t = case(name)
    with torch.no_grad():
        out = published_head()(t["in.x"], t["in.t"], t["in.c"])
    torch.testing.assert_close(out, t["out.out"], rtol=0, atol=1e-5)


def test_head_network_without_swiglu_matches_published():
    info, t = case(HEAD_NET[3])
    head = BinaryDiffusionHead(HeadConfig.from_dict(info["head_config"]))
    shapes = {name.removeprefix("net."): t.shape for name, t in head.state_dict().items()}
    load_strict(head.net, synthetic(shapes), "synthetic weights")
    with torch.no_grad():
        out = head(t["in.x"], t["in.t"], t["in.c"])
    torch.testing.assert_close(out, t["out.out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HEAD_SAMPLE)
def test_sampler_matches_published(name):
    info, t = case(name)
    head, draws = published_head(), iter(t["draw0"])
    embedded = head.prepare(t["in.c"])
    denoise = lambda x, t, _: head.denoise(x, head.embed_time(t), embedded)  # noqa: E731
    with torch.no_grad():
        out = euler_maruyama(
            partial(guided_velocity, denoise, guidance=info["cfg"]),
            next(draws),
            info["num_sampling_steps"],
            lambda: next(draws),
            info["time_shift"],
        )
    assert next(draws, None) is None
    expected = t["out.x"]
    torch.testing.assert_close(out, expected[: len(out)], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", HEAD_LOSS)
def test_training_loss_and_gradients_match_published(name):
    info, t = case(name)
    fields = ("P_mean", "P_std", "time_schedule", "time_shift", "diff_batch_mul")
    head = published_head(**{field: info[field] for field in fields}).train()
    config = head.config
    t_K = warp_time(t["draw0"][0], config.time_schedule, config.P_mean, config.P_std, config.time_shift)
    loss_KP = head.loss_at(t["in.x"], t["in.cond"], t_K, t["draw1"][0])
    torch.testing.assert_close(loss_KP, t["out.loss"], rtol=1e-4, atol=1e-5)
    loss_KP.mean().backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    for key, expected in t.items():
        if key.startswith("out.grad."):
            torch.testing.assert_close(gradients[key.removeprefix("out.grad.")], expected, rtol=1e-4, atol=1e-4)
    assert set(info["grad_norms"]) == set(gradients)
    for parameter, norm in info["grad_norms"].items():
        assert gradients[parameter].norm().item() == pytest.approx(norm, rel=1e-4), parameter


@pytest.fixture(scope="module")
def model():
    return load_model(CHECKPOINT, "cpu")


def with_block_size(model, parallel_num):
    """The same weights, another number of tokens per step: only vision_head_config.json differs."""
    head = BinaryDiffusionHead(dataclasses.replace(model.head.config, parallel_num=parallel_num))
    head.load_state_dict(model.head.state_dict())
    other = BitDanceModel(model.tokenizer, model.text_tokenizer, model.projector, model.backbone, head)
    return other.eval()


@pytest.mark.parametrize("name", [*GEN, GENERATE_API])
def test_generation_matches_published(name, model, monkeypatch):
    info, t = case(name)
    model = with_block_size(model, info["parallel_num"])
    conditions, predictions, calls = [], [], []
    prepare = model.head.prepare
    monkeypatch.setattr(model.head, "prepare", lambda cond: conditions.append(cond) or prepare(cond))

    def recording(*args):
        predictions.append(euler_maruyama(*args))
        return predictions[-1]

    monkeypatch.setitem(SAMPLERS, "euler_maruyama", recording)
    hook = model.backbone.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    draws, (h, w) = iter(t["draw0"]), info["latent_grid"]
    try:
        bits_BChw = generate_bits(
            model,
            [info["prompt"]] * info["num_images"],
            h,
            w,
            Sampling(info["num_sampling_steps"], info["guidance_scale"]),
            [torch.Generator() for _ in range(info["num_images"])],
            noise=lambda: next(draws),
        )
    finally:
        hook.remove()
    assert next(draws, None) is None, "more draws were recorded than taken"
    plan = PatchPlan(h, w, info["ps"])
    assert torch.equal(plan.order(bits_BChw), t["out.bits"].float())
    assert len(conditions) == len(predictions) == len(calls) == plan.num_blocks
    if "out.head_cond" in t:
        close(torch.stack(conditions), t["out.head_cond"], 5e-5)
    else:
        close(conditions[0], t["out.head_cond_first_block"], 5e-5)
    pred = torch.stack(predictions)
    close(pred, t["out.pred"][:, : pred.shape[1]], 1e-3)
    check_backbone_traces(t, calls, plan.block_size)

    with torch.no_grad():
        image = model.tokenizer.decode(bits_BChw)
    if "out.image" in t:
        close(image, t["out.image"], 1e-4)
    if "out.image_sub4" in t:
        close(image[:, :, ::4, ::4], t["out.image_sub4"], 1e-4)
    if "out.image_uint8" in t:
        assert (to_uint8(image).int() - t["out.image_uint8"].int()).abs().max() <= 1


def check_backbone_traces(t, calls, P):
    """The published pipeline calls the backbone per branch and for prefix and block 0 apart; ours does all that at
    once."""
    inputs, outputs = calls[0]
    for row, branch in enumerate(("cond", "uncond")):
        if f"out.llm.{branch}_prefix.in" not in t:
            continue
        length = t[f"out.llm.{branch}_prefix.in"].shape[1] + P
        for kind, ours in (("in", inputs), ("out", outputs)):
            close(ours[row, -length:-P], t[f"out.llm.{branch}_prefix.{kind}"][0], 5e-5)
            close(ours[row, -P:], t[f"out.llm.{branch}_block0.{kind}"][0], 5e-5)
    for row, key in ((0, "step_cond.in"), (0, "step_cond.out"), (1, "step_uncond.out")):
        if f"out.llm.{key}" in t:
            ours = torch.stack([call[key.endswith("out")][row] for call in calls[1:]])
            close(ours, t[f"out.llm.{key}"][:-1, 0], 5e-5)  # the published last call feeds nobody


def test_pipeline_with_a_seed_matches_published():
    info, t = case(GENERATE_API)
    pipe = BitDancePipeline.from_pretrained(CHECKPOINT, device="cpu")
    out = pipe(
        info["prompt"],
        info["height"],
        info["width"],
        num_inference_steps=info["num_sampling_steps"],
        guidance_scale=info["guidance_scale"],
        seed=info["generate_seed"],
    )
    assert torch.equal(PatchPlan(8, 8, 2).order(out.bits), t["out.bits"].float())
    pixels = torch.from_numpy(np.array(out.images[0])).int()
    assert (pixels - t["out.image_uint8"][0].int()).abs().max() <= 1
