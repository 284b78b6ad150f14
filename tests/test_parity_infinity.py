"""Parity with Infinity (tests/golden/infinity/PARITY.md): tokenizer, positions, text, self-correction, losses, whole
generations."""

import pytest
import torch
from scale_cases import by_scale, close, infinity_case, infinity_network, infinity_recorded, infinity_tokenizer, joined
from torch.nn import functional as F

from bitdance.heads.categorical import draw, filtered
from bitdance.kinds.next_scale.config import PUBLISHED
from bitdance.kinds.next_scale.generate import Given, generate_tokens
from bitdance.kinds.next_scale.model import scale_losses, scale_weights
from bitdance.kinds.next_scale.network import NextScaleNetwork
from bitdance.kinds.next_scale.positions import scale_turns, stretched
from bitdance.kinds.next_scale.published import renamed
from bitdance.kinds.next_scale.schedule import SCHEDULES, schedule_of
from bitdance.kinds.next_scale.settings import NextScaleSettings
from lfq_tokenizer.scales import ScaleBits

NAMES = infinity_recorded()["cases"]
ENCODES = tuple(name for name in NAMES if name.startswith("vae_") and "/encode" in name)
DECODES = ("vae_a/decode", "vae_b/decode")
ROPES = ("rope/square", "rope/rect")
TEXTS = ("text/a", "text/b")
CORRECTIONS = tuple(name for name in NAMES if name.startswith("bsc/"))
FORWARDS = tuple(name for name in NAMES if name.startswith("forward/"))
TRAININGS = tuple(name for name in NAMES if name.startswith("train/"))
SAMPLES = tuple(name for name in NAMES if name.startswith("sample/"))
LATER = {"data/transform"}
COUNTS = {
    "Infinity-125M": 125_148_800,
    "Infinity-layer16": 361_578_464,
    "Infinity-layer24": 940_871_072,
    "Infinity-2B": 2_204_564_032,
    "Infinity-layer32": 2_256_694_912,
    "Infinity-layer40": 4_716_421_888,
    "Infinity-layer48": 8_767_198_528,
    "Infinity-8B": 8_375_791_824,
}


def pixels(levels):
    unit = levels.float() / 255
    return unit + unit - 1


def fine(tokens, patchify):
    """Bits of a scale on the tokenizer's own grid."""
    return F.pixel_shuffle(tokens, 2) if patchify else tokens


def coarse(bits_BLd, sides, patchify):
    """Recorded bits on the tokenizer's grid, 0 and 1 → tokens of every scale in ±1."""
    own = [(2 * h, 2 * w) for h, w in sides] if patchify else sides
    scales = by_scale(bits_BLd.float() * 2 - 1, own)
    return [F.pixel_unshuffle(one, 2) if patchify else one for one in scales]


def as_recorded(scales):
    return (joined(scales) > 0).to(torch.uint8)


@pytest.mark.parametrize("name", ENCODES)
@torch.no_grad()
def test_pictures_become_the_recorded_bits(name):
    info, t = infinity_case(name)
    tokenizer = infinity_tokenizer(name.split("/")[0])
    close(tokenizer.latents(pixels(t["in.image_u8"])), t["out.latent"])
    tokens = tokenizer.encode(pixels(t["in.image_u8"]), info["sides"])
    assert torch.equal(as_recorded([fine(one, tokenizer.config.patchify) for one in tokens]), t["out.bits"])
    close(tokenizer.quantize.sums(tokens, info["sides"])[-1], t["out.quantized"], 1e-5)


@pytest.mark.parametrize("name", DECODES)
@torch.no_grad()
def test_bits_become_the_recorded_picture(name):
    info, t = infinity_case(name)
    tokenizer = infinity_tokenizer(name.split("/")[0])
    tokens = coarse(t["in.bits"], info["sides"], tokenizer.config.patchify)
    close(tokenizer.quantize.sums(tokens, info["sides"])[-1], t["out.codes"], 1e-5)
    close(tokenizer.decode(tokens), t["out.image"])


def test_zeros_are_bit_0():
    _, t = infinity_case("bsq/quantize")
    quantizer = ScaleBits(8)
    bits = quantizer.quantise(t["in.x"][:, :, 0])
    assert torch.equal((bits.permute(0, 2, 3, 1) > 0).to(torch.uint8), t["out.bits"][:, 0])
    close(quantizer.code(bits), t["out.codes"][:, :, 0], 1e-6)


def test_the_entropy_terms_and_their_gradients():
    _, t = infinity_case("bsq/entropy")
    quantizer, side = ScaleBits(8), (4, 5)
    x = t["in.x"].clone().requires_grad_()
    unit = F.normalize(x, dim=1)
    per_sample, of_mean, commitment = quantizer.terms(unit)
    close(per_sample, t["out.per_sample_entropy"], 1e-5)
    close(of_mean, t["out.codebook_entropy"], 1e-5)
    close(commitment, t["out.commitment"], 1e-6)
    aux = 0.25 * commitment + 0.1 * (per_sample - of_mean) / 100
    close(aux, t["out.aux_loss"], 1e-6)
    (gradient,) = torch.autograd.grad(aux, x)
    close(gradient, t["out.grad_aux"], 1e-6)
    total, losses = quantizer(x, [side])  # one scale: nothing is shrunk or enlarged
    close(total.detach(), quantizer.sums(quantizer.encode(x.detach(), [side]), [side])[-1], 1e-6)
    close(losses.commitment, commitment, 1e-7)
    (total.flatten(2).transpose(1, 2) * t["in.r"]).sum().backward()
    close(x.grad, t["out.grad_straight_through"], 1e-5)


def test_schedules_are_the_published_ones():
    known = infinity_recorded()["scales_h_w_by_ratio"]
    assert {float(ratio): [tuple(side) for side in sides] for ratio, sides in known.items()} == {
        ratio: list(sides) for ratio, sides in SCHEDULES.items()
    }
    assert schedule_of((20, 16)) == SCHEDULES[1.25][:7] and schedule_of((64, 64)) == SCHEDULES[1.0]
    with pytest.raises(ValueError, match="nearest are 320×256"):
        schedule_of((20, 17))


@pytest.mark.parametrize("name", ROPES)
def test_positions_match_published(name):
    info, t = infinity_case(name)
    turns = scale_turns(info["sides"], 32)
    close(turns[..., 0], t["out.cos"], 1e-5)
    close(turns[..., 1], t["out.sin"], 1e-5)


def test_places_of_all_schedules_match_published():
    _, t = infinity_case("rope/indices_1M")
    for key, expected in t.items():
        kind, ratio = key.removeprefix("out.").split("_")
        sides = SCHEDULES[float(ratio)]
        axis = 0 if kind == "rows" else 1
        found = torch.cat([stretched(side[axis], sides[-1][axis]) for side in sides])
        assert torch.equal(found.to(torch.uint8), expected), key


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_what_is_read_of_a_text_matches_published(name):
    info, t = infinity_case(name)
    network = infinity_network(f"gpt_{name[-1]}")
    condition = network.of_text(t["in.features"].split(info["lens"]))
    close(network.text_norm(t["in.features"]), t["out.normed"], 1e-5)
    close(condition.vector_BD, t["out.pooled"], 1e-5)
    for row, expected in zip(condition.text_BTD, t["out.context"].split(info["lens"]), strict=True):
        close(row[: len(expected)], expected, 1e-5)
    close(network.shared_ada_lin(condition.vector_BD).unflatten(-1, (6, -1)), t["out.shared_ada"][:, 0], 1e-5)


def recorded_flips(t, sides, B, bits, patchify):
    """The bits that recorded draws turn, as tokens; published code draws on the tokenizer's grid."""
    flips, at = [], 0
    for (h, w), strength in zip(sides, t["draw0"].tolist(), strict=False):
        h, w = (2 * h, 2 * w) if patchify else (h, w)
        drawn = t["draw1"][at : at + B * h * w * bits].view(B, h, w, bits)
        at += drawn.numel()
        turned = (drawn < 0.01 * strength).permute(0, 3, 1, 2)
        flips.append(F.pixel_unshuffle(turned.float(), 2) > 0 if patchify else turned)
    assert at == len(t["draw1"])
    return flips


@pytest.mark.parametrize("name", CORRECTIONS)
def test_self_correction_matches_published(name):
    info, t = infinity_case(name)
    quantizer = infinity_tokenizer(info["vae"]).quantize
    patchify, (B, bits) = quantizer.patchify, t["in.latent"].shape[:2]
    flips = recorded_flips(t, info["sides"], B, bits, patchify) if "draw0" in t else []
    targets, inputs = quantizer.teach(t["in.latent"], info["sides"], flips)
    assert torch.equal(as_recorded(targets), t["out.target_bits"])
    close(joined(inputs), t["out.x"], 1e-5)
    if flips:
        turned = [torch.where(flip, -one, one) for flip, one in zip(flips, targets, strict=False)]
        assert torch.equal(as_recorded([fine(one, patchify) for one in turned]), t["out.flipped_bits_vae_layout"])


def texts(network, features, lens, draws):
    """Features of each text; those whose draw is below 0.1 are replaced."""
    parts = list(features.split(lens))
    return [network.cfg_uncond[: len(one)] if float(drawn) < 0.1 else one for one, drawn in zip(parts, draws, strict=True)]


@pytest.mark.parametrize("name", FORWARDS)
@torch.no_grad()
def test_logits_match_published(name):
    info, t = infinity_case(name)
    network, seen = infinity_network(info["gpt"]), {}
    for key, block in (("block_first", network.blocks[0]), ("block_last", network.blocks[-1])):
        block.register_forward_hook(lambda _, __, out, key=key: seen.__setitem__(key, out))
    condition = network.of_text(texts(network, t["in.features"], info["lens"], t["draw0"]))
    close(network(by_scale(t["in.x"], info["sides"][1:]), condition, info["sides"]), t["out.logits"], 1e-3)
    for key, found in seen.items():
        if f"out.{key}" in t:
            close(found, t[f"out.{key}"], 1e-3)


@pytest.mark.parametrize("name", TRAININGS)
def test_training_steps_match_published(name):
    info, t = infinity_case(name)
    network, tokenizer = infinity_network(info["gpt"]), infinity_tokenizer(info["vae"])
    sides, patchify = info["sides"], tokenizer.config.patchify
    with torch.no_grad():
        latents = tokenizer.latents(pixels(t["in.image_u8"]))
    B, bits = latents.shape[:2]
    targets, inputs = tokenizer.quantize.teach(latents, sides, recorded_flips(t, sides, B, bits, patchify))
    assert torch.equal(as_recorded(targets), t["out.target_bits"])
    trained = min(info["always_training_scales"], len(sides))
    targets, inputs = targets[:trained], inputs[: trained - 1]
    close(joined(inputs), t["out.x"], 1e-5)
    depth = network.config.depth
    share = torch.linspace(0, infinity_recorded()["config"][info["gpt"]]["drop_path_rate"], depth)[1:]
    kept = torch.cat([torch.ones(1, 2, B), t["draw3"].view(depth - 1, 2, B) / (1 - share)[:, None, None]])
    condition = network.of_text(texts(network, t["in.features"], info["lens"], t["draw2"]))
    of_bits = scale_losses(network, targets, inputs, condition, sides, kept, info["label_smooth"])
    of_tokens = of_bits.sum(-1) if info["bitloss_type"] == "sum" else of_bits.mean(-1)
    weights = scale_weights(sides, bool(info["reweight_loss_by_scale"]))[: of_tokens.shape[1]]
    if trained < len(sides):
        weights = scale_weights(sides[:trained], bool(info["reweight_loss_by_scale"]))
    loss = (of_tokens * weights).sum(-1).mean()
    close(loss.double(), t["out.loss"].double(), 1e-5)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    chunk = depth // infinity_recorded()["config"][info["gpt"]]["block_chunks"]
    recorded = {k.removeprefix("out.grad."): v for k, v in t.items() if k.startswith("out.grad.")}
    for key, expected in renamed(recorded, chunk).items():
        close(gradients[key], expected, 1e-5)
    norms = renamed(infinity_recorded()["cases"][name]["info"]["grad_norms"], chunk)
    for key, norm in norms.items():
        found = 0.0 if gradients[key] is None else gradients[key].norm().item()
        assert found == pytest.approx(norm, rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("name", SAMPLES)
@torch.no_grad()
def test_generations_match_published(name):
    info, t = infinity_case(name)
    network, tokenizer, sides = infinity_network(info["gpt"]), infinity_tokenizer(info["vae"]), info["sides"]
    settings = NextScaleSettings(
        1.0,
        "constant",
        top_k=info["top_k"],
        top_p=info["top_p"],
        guidance_by_scale=tuple(info["cfg_list"]),
        tau_by_scale=tuple(info["tau_list"]),
        insertion=tuple(info["cfg_insertion_layer"]),
    )
    features = list(t["in.features"].split(info["lens"]))
    against = [network.cfg_uncond[: len(one)] for one in features]
    if "in.negative" in t:
        against = list(t["in.negative"].split(info["negative_lens"]))
    condition = network.of_text(features + against if settings.guided else features)
    g, given = torch.Generator().manual_seed(info["seed"]), None
    if "gt_leak" in info:
        own = coarse(t["in.gt_bits"], sides, tokenizer.config.patchify)
        given = Given(own, [torch.full((1, *side), k < info["gt_leak"]) for k, side in enumerate(sides)])

    def exponential(pictures, shape):
        return torch.empty(len(pictures) * shape[0] * shape[1], 2).exponential_(1, generator=g).view(len(pictures), *shape)

    canvas = generate_tokens(network, tokenizer.quantize, condition, sides, settings, exponential, info["B"], given=given)
    expected = t["out.bits"]
    if given is not None:  # recorded are the sampled bits, which the given ones replace
        used = coarse(t["out.used_bits_vae_layout"], sides, tokenizer.config.patchify)
        assert torch.equal(as_recorded(canvas.scales), as_recorded(used))
    else:
        assert torch.equal(as_recorded(canvas.scales), expected)
    close(canvas.total, t["out.codes"], 1e-5)
    close(tokenizer.decode_sum(canvas.total)[:, :, ::4, ::4], t["out.image_sub4"])


def test_bits_are_filtered_and_drawn_as_published():
    info, t = infinity_case("sampler/topk_topp")
    for n, (top_k, top_p) in enumerate(info["settings"]):
        logits = filtered(t["in.logits"], top_k, top_p)
        close(logits.softmax(-1), t[f"out.probs{n}"], 1e-6)
        assert torch.equal(draw(logits, t[f"draw{n}"].view_as(logits)).to(torch.uint8), t[f"out.bits{n}"])


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_to_the_digit(name):
    with torch.device("meta"):
        network = NextScaleNetwork(PUBLISHED[name])
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[name]
