"""Parity with VAR (tests/golden/var/PARITY.md): tokenizer, transformer, losses, gradients, whole generations, edits."""

import copy

import pytest
import torch
from scale_cases import SIDES, by_scale, close, joined, var_case, var_network, var_recorded, var_tokenizer
from torch.nn import functional as F

from bitdance.heads.categorical import draw, filtered, softened
from bitdance.kinds.next_scale.config import PUBLISHED
from bitdance.kinds.next_scale.generate import Given, generate_tokens
from bitdance.kinds.next_scale.model import scale_losses
from bitdance.kinds.next_scale.network import NextScaleNetwork, scale_mask
from bitdance.kinds.next_scale.pipeline import kept_places
from bitdance.kinds.next_scale.published import renamed
from bitdance.kinds.next_scale.settings import NextScaleSettings
from lfq_tokenizer import scale_file
from lfq_tokenizer.scales import ScaleCodes, shared_index, squares
from stages.config import OptimizerConfig
from stages.engine.learner import learning_rate, weight_decay

NAMES = var_recorded()["cases"]
QUANTS = tuple(name for name in NAMES if name.startswith("quant/"))
LOGITS = ("var/logits", "var_saln/logits")
LOSSES = ("loss/var", "loss/var_droppath", "loss/var_saln_ls")
SAMPLES = tuple(name for name in NAMES if name.startswith("sample/"))
EDITS = tuple(name for name in NAMES if name.startswith("edit/"))
# what neither training nor sampling reads: statistics of use
LATER = {"tok/usage"}
MASKS = ("mask/edit_256", "mask/edit_512")
COUNTS = {
    "VAR-d16": 310_283_520,
    "VAR-d20": 600_917_136,
    "VAR-d24": 1_033_399_360,
    "VAR-d30": 2_010_020_356,
    "VAR-d36-512": 2_353_893_904,
}


def pictures():
    return var_case("tok/encode")[1]["in.image_u8"].float() / 127.5 - 1


def test_the_shared_convolutions_are_the_recorded_ones():
    _, t = var_case("phi_index")
    for n in (2, 3, 4, 5, 8):
        for row, expected in enumerate(t[f"out.k{n}"].tolist()):
            assert shared_index(row + 2, n) == [k for k in expected if k >= 0]


@pytest.mark.parametrize("name", QUANTS)
def test_the_quantiser_its_loss_and_gradients(name):
    info, t = var_case(name)
    sides = squares(info["patch_nums"])
    shape = t["in.embedding"].shape
    quantizer = ScaleCodes(*shape, len(sides), info["share_quant_resi"], info["quant_resi"], info["using_znorm"])
    with torch.no_grad():
        quantizer.embedding.weight.copy_(t["in.embedding"])
        for conv, weight, bias in zip(quantizer.smooth, t.get("in.phi_weight", ()), t.get("in.phi_bias", ()), strict=True):
            conv.weight.copy_(weight)
            conv.bias.copy_(bias)
    f = t["in.f"].clone().requires_grad_()
    targets, inputs = quantizer.teach(f.detach(), sides)
    assert torch.equal(joined(targets), t["out.idx"])
    close(joined(inputs), t["out.var_input"], 1e-5)
    close(quantizer.sums(targets, sides)[-1], t["out.f_hat_last"], 1e-5)
    out, losses = quantizer(f, sides, info["beta"])
    loss = losses.commitment
    close(loss, t["out.vq_loss"], 1e-6)
    (loss + (out * t["in.r"]).sum()).backward()
    close(f.grad, t["out.grad_f"], 1e-6)
    if "out.grad_embedding" in t:
        close(quantizer.embedding.weight.grad, t["out.grad_embedding"], 1e-6)
    if "out.grad_phi_bias" in t:
        found = [torch.zeros_like(c.bias) if c.bias.grad is None else c.bias.grad for c in quantizer.smooth]
        close(torch.stack(found), t["out.grad_phi_bias"], 1e-6)


@torch.no_grad()
def test_pictures_become_the_recorded_codes():
    _, t = var_case("tok/encode")
    tokenizer = var_tokenizer()
    close(tokenizer.latents(pictures()), t["out.f"])
    tokens = tokenizer.encode(pictures(), SIDES)
    assert torch.equal(joined(tokens), t["out.idx"])
    for found, expected in zip(tokenizer.quantize.sums(tokens, SIDES), t["out.f_hat"], strict=True):
        close(found, expected, 1e-5)


@torch.no_grad()
def test_a_rectangular_picture():
    info, t = var_case("tok/encode_rect")
    tokenizer, sides = var_tokenizer(), squares(info["v_patch_nums"])
    tokens = tokenizer.encode(t["in.image_u8"].float() / 127.5 - 1, sides)
    assert torch.equal(joined(tokens), t["out.idx"])
    close(tokenizer.quantize.sums(tokens, sides)[-1], t["out.f_hat_last"], 1e-5)
    close(tokenizer.decode(tokens)[:, :, ::4, ::4], t["out.image_sub4"])


@torch.no_grad()
def test_codes_become_the_recorded_pictures():
    _, t = var_case("tok/decode")
    tokenizer = var_tokenizer()
    sums = tokenizer.quantize.sums(by_scale(t["in.idx"], SIDES), SIDES)
    for found, total, picture in zip(sums, t["out.f_hat"], t["out.images_sub4"], strict=True):
        close(found, total, 1e-5)
        close(tokenizer.decode_sum(found)[:, :, ::4, ::4], picture)


@torch.no_grad()
def test_a_sum_becomes_the_recorded_picture():
    _, t = var_case("tok/fhat_to_img")
    close(var_tokenizer().decode_sum(t["in.f_hat"]), t["out.image"])


def test_the_loss_of_the_tokenizer_and_its_gradients():
    info, t = var_case("tok/train")
    tokenizer = copy.deepcopy(var_tokenizer()).requires_grad_()
    out, losses = tokenizer.quantize(tokenizer.latents(pictures()), SIDES)
    loss = losses.commitment
    close(out, t["out.f_hat"], 1e-5)
    close(loss, t["out.vq_loss"], 1e-5)
    picture = tokenizer.decoder(tokenizer.post_quant_conv(out))
    close(picture[:, :, ::4, ::4], t["out.rec_sub4"])
    (loss + (picture - pictures()).abs().mean()).backward()
    gradients = {key: parameter.grad for key, parameter in tokenizer.named_parameters()}
    for key, norm in scale_file.renamed(info["grad_norms"]).items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), key


@torch.no_grad()
def test_the_transformer_reads_the_recorded_input():
    _, t = var_case("tf/input")
    tokens = by_scale(var_case("tok/encode")[1]["out.idx"], SIDES)
    quantizer = var_tokenizer().quantize
    sums = quantizer.sums(tokens, SIDES)
    close(joined([quantizer.input(one, side) for one, side in zip(sums, SIDES[1:], strict=False)]), t["out.x"], 1e-5)


@pytest.mark.parametrize("name", LOGITS)
@torch.no_grad()
def test_logits_match_published(name):
    info, t = var_case(name)
    network, _ = var_network(info["model"]), None
    dropped = torch.tensor(info["dropped"])
    assert torch.equal(t["draw0"] < 0.1, dropped)
    classes = torch.where(dropped, network.null_class, t["in.label"])
    logits = network(by_scale(var_case("tf/input")[1]["out.x"], SIDES[1:]), network.of_classes(classes), SIDES)
    close(logits, t["out.logits"])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_match_published(name):
    info, t = var_case(name)
    network, tokenizer = var_network(info["model"]), var_tokenizer()
    classes = torch.where(t["draw0"] < 0.1, network.null_class, t["in.label"])
    kept = None
    if "draw1" in t:  # masks of 0 and 1 for every block but the first, attention before the feed-forward network
        B, depth = len(classes), network.config.depth
        share = torch.linspace(0, info["drop_path_rate"], depth)[1:]
        drawn = t["draw1"].view(depth - 1, 2, B) / (1 - share)[:, None, None]
        kept = torch.cat([torch.ones(1, 2, B), drawn])
    with torch.no_grad():
        targets, inputs = tokenizer.quantize.teach(tokenizer.latents(pictures()), SIDES)
    loss = scale_losses(network, targets, inputs, network.of_classes(classes), SIDES, kept, info["label_smooth"]).mean()
    close(loss, t["out.loss"], 1e-5)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    for key, expected in renamed({k.removeprefix("out.grad."): v for k, v in t.items() if k.startswith("out.grad.")}).items():
        close(gradients[key], expected, 1e-5)
    norms = renamed(info["grad_norms"])
    assert set(norms) == set(gradients)
    for key, norm in norms.items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), key


def test_the_first_scales_alone_in_progressive_training():
    info, t = var_case("loss/var_prog2")
    network, tokenizer, count = var_network(info["model"]), var_tokenizer(), info["prog_si"] + 1
    classes = torch.where(t["draw0"] < 0.1, network.null_class, t["in.label"])
    with torch.no_grad():
        targets, inputs = tokenizer.quantize.teach(tokenizer.latents(pictures()), SIDES)
    losses = scale_losses(network, targets[:count], inputs[: count - 1], network.of_classes(classes), SIDES)
    newest = SIDES[count - 1][0] * SIDES[count - 1][1]
    weights = torch.full((losses.shape[1],), 1 / sum(h * w for h, w in SIDES))
    weights[-newest:] *= 1 / info["prog_wp_it"]  # the weight of a new scale rises step by step; this is the first
    loss = (losses * weights).sum(dim=1).mean()
    close(loss, t["out.loss"], 1e-5)
    loss.backward()
    for key, norm in renamed(info["grad_norms"]).items():
        assert dict(network.named_parameters())[key].grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), key


def test_rates_and_weight_decay_are_the_recorded_ones():
    info, t = var_case("lr")
    way = {"warmup_steps": int(info["wp_it"]), "warmup_from": info["wp0"], "final_fraction": info["wpe"], "lr": info["peak_lr"]}
    own = {"weight_decay": info["wd"], "weight_decay_end": info["wd_end"]}
    schedules = {
        name: OptimizerConfig(schedule="linear", hold=hold, **way, **own) for name, hold in (("lin0", 0.05), ("lin", 0.15))
    }
    for name, config in schedules.items():
        found = [learning_rate(config, it, info["max_it"]) for it in info["its"]]
        close(torch.tensor(found, dtype=torch.float64), t[f"out.lr_{name}"], 1e-12)
    decay = [weight_decay(schedules["lin0"], it, info["max_it"]) for it in info["its"]]
    close(torch.tensor(decay, dtype=torch.float64), t["out.wd"], 1e-12)


def test_optimiser_steps_match_published():
    info, t = var_case("train_steps/var")
    network, tokenizer = var_network("var"), var_tokenizer()
    spared = {key for key, _ in network.named_parameters() if key in renamed(dict.fromkeys(info["no_decay"]))}
    config = OptimizerConfig(
        lr=info["tlr"],
        warmup_steps=info["wp_it"],
        warmup_from=info["wp0"],
        schedule="linear",
        hold=0.05,
        final_fraction=info["wpe"],
        weight_decay=info["twd"],
        weight_decay_end=info["twde"],
    )
    parameters = dict(network.named_parameters())
    groups = [{"params": [p for key, p in parameters.items() if (key in spared) == which]} for which in (False, True)]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    with torch.no_grad():
        targets, inputs = tokenizer.quantize.teach(tokenizer.latents(pictures()), SIDES)
    B, depth, share = (
        len(t["in.label"]),
        network.config.depth,
        torch.linspace(0, 0.1 * network.config.depth / 24, network.config.depth),
    )
    for it in range(info["iters"]):
        adam.param_groups[0]["weight_decay"] = weight_decay(config, it, info["max_it"])
        adam.param_groups[1]["weight_decay"] = 0.0
        for group in adam.param_groups:
            group["lr"] = learning_rate(config, it, info["max_it"])
        close(torch.tensor(adam.param_groups[0]["lr"]), t["out.lr"][it].float(), 1e-8)
        classes = torch.where(t[f"draw{2 * it}"] < 0.1, network.null_class, t["in.label"].roll(it))
        drawn = t[f"draw{2 * it + 1}"].view(depth - 1, 2, B) / (1 - share[1:])[:, None, None]
        kept = torch.cat([torch.ones(1, 2, B), drawn])
        loss = scale_losses(network, targets, inputs, network.of_classes(classes), SIDES, kept).mean()
        close(loss.detach(), t["out.loss"][it], 1e-4)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), info["tclip"])
        assert norm.item() == pytest.approx(t["out.grad_norm"][it].item(), rel=1e-3)
        adam.step()
    for key, expected in renamed({k.removeprefix("out.param."): v for k, v in t.items() if k.startswith("out.param.")}).items():
        close(parameters[key].detach(), expected)


@torch.no_grad()
def test_a_validation_pass_matches_published():
    _, t = var_case("eval/var")
    network, tokenizer = var_network("var"), var_tokenizer()
    classes = torch.where(t["draw0"] < 0.1, network.null_class, t["in.label"])
    targets, inputs = tokenizer.quantize.teach(tokenizer.latents(pictures()), SIDES)
    losses, last = scale_losses(network, targets, inputs, network.of_classes(classes), SIDES), SIDES[-1][0] * SIDES[-1][1]
    right = network(inputs, network.of_classes(classes), SIDES).argmax(dim=-1) == joined(targets)
    for found, expected in (
        (losses.mean(), t["out.L_mean"]),
        (losses[:, -last:].mean(), t["out.L_tail"]),
        (100 * right.float().mean(), t["out.acc_mean"]),
        (100 * right[:, -last:].float().mean(), t["out.acc_tail"]),
    ):
        close(found, expected.squeeze(), 1e-4)


def replayed(seed, B, generator=None):
    """Draws of a batch from one generator, as the published code makes them."""
    g = generator or torch.Generator().manual_seed(seed)
    return lambda pictures, shape: torch.empty(B * shape[0], *shape[1:]).exponential_(1, generator=g).view(B, *shape)


def made(info, t, classes, exponential, given=None):
    network, tokenizer = var_network(info["model"]), var_tokenizer()
    settings = NextScaleSettings(info["cfg"], top_k=info["top_k"], top_p=info["top_p"], more_smooth=info["more_smooth"])
    classes = torch.where(classes < 0, network.null_class, classes)
    rows = torch.cat([classes, torch.full_like(classes, network.null_class)]) if settings.guided else classes
    with torch.no_grad():
        condition = network.of_classes(rows)
        canvas = generate_tokens(network, tokenizer.quantize, condition, SIDES, settings, exponential, info["B"], given=given)
        total = t["out.f_hat_last"] if "out.f_hat_last" in t else t["out.f_hat"][-1]
        close(canvas.total, total, 2e-3 if info["more_smooth"] else 1e-4)
        picture = (tokenizer.decode_sum(canvas.total) + 1) / 2
        close(picture[:, :, ::4, ::4], t["out.image_sub4"], 2e-3 if info["more_smooth"] else 1e-4)
    return canvas


@pytest.mark.parametrize("name", SAMPLES)
def test_generations_match_published(name):
    info, t = var_case(name)
    B, seed = info["B"], info["global_seed"] if info["g_seed"] is None else info["g_seed"]
    generator = torch.Generator().manual_seed(seed)
    if "label_none" in name:
        classes = torch.multinomial(torch.full((10,), 0.1), B, replacement=True, generator=generator)
        assert torch.equal(classes, t["out.label"])
    else:
        classes = t["in.label"] if "in.label" in t else torch.full((B,), info["label_int"])
    canvas = made(info, t, classes, replayed(seed, B, generator))
    assert torch.equal(joined(canvas.scales), t["out.idx_unused" if info["more_smooth"] else "out.idx"])


@pytest.mark.parametrize("name", EDITS)
def test_edits_match_published(name):
    info, t = var_case(name)
    mask = t["in.edit_mask"].float()
    mask = (mask if mask.ndim == 3 else mask[None])[:, None]
    keep = [F.interpolate(mask, side, mode="bilinear")[:, 0] > 0.5 for side in SIDES]
    keep[0] = torch.ones_like(keep[0])  # the first scale is always the picture's
    keep = [one.expand(info["B"], -1, -1) for one in keep]
    assert torch.equal(joined(keep), t["out.keep"].bool())
    given = Given(by_scale(t["in.tokens"], SIDES), keep)
    canvas = made(info, t, t["in.label"], replayed(info["g_seed"], info["B"]), given)
    assert torch.equal(joined(canvas.scales)[joined(keep)], t["in.tokens"][joined(keep)])


def test_the_mask_is_the_recorded_one():
    _, t = var_case("mask/attention")
    assert torch.equal(scale_mask(SIDES), t["out.allowed"].bool())


@pytest.mark.parametrize("name", MASKS)
def test_boxes_keep_the_recorded_tokens(name):
    info, t = var_case(name)
    sides = squares(info["patch_nums"])
    for i in range(len(info["boxes"])):
        for way in ("in", "out"):
            mask = t[f"out.box{i}_{way}"]
            kept = kept_places(mask == 0, sides, 1)
            assert torch.equal(joined(kept)[0], t[f"out.box{i}_{way}_keep"].flatten().bool())


def test_softened_draws_match_published():
    info, t = var_case("fn/gumbel")
    for n, (heat, hard) in enumerate(info["settings"]):
        found = softened(t["in.logits"], t["draw0"].view(-1, 3, 4, 24)[n], heat)
        close(F.one_hot(found.argmax(dim=-1), 24).float() if hard else found, t[f"out.y{n}"], 1e-5)


def test_random_numbers_are_those_that_torch_gave():
    """What the recorded generations were drawn with: if torch changes it, seeds give other pictures."""
    info, t = var_case("fn/rng")
    generator = torch.Generator().manual_seed(info["seed"])
    close(torch.empty(5, 7).exponential_(1, generator=generator), t["out.exponential_5x7"], 0)
    close(torch.empty(3).exponential_(1, generator=generator), t["out.exponential_next_3"], 0)
    for B in info["B"]:
        for n in info["num_classes"]:
            generator = torch.Generator().manual_seed(info["seed"])
            drawn = torch.multinomial(torch.full((n,), 1 / n), B, replacement=True, generator=generator)
            assert torch.equal(drawn, t[f"out.label_B{B}_n{n}"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(info["seed"])
        close(torch.rand(4), t["out.rand4"], 0)
        close(torch.empty(4).bernoulli_(0.7), t["out.bernoulli_4"], 0)


def test_filters_and_draws_match_published():
    info, t = var_case("fn/top_k_top_p")
    for n, (top_k, top_p) in enumerate(info["settings"]):
        logits = filtered(t["in.logits"], top_k, top_p)
        assert torch.equal(logits, t[f"out.masked{n}"])
        q = torch.empty(12, 24).exponential_(1, generator=torch.Generator().manual_seed(info["seed"] + n)).view(3, 4, 24)
        assert torch.equal(draw(logits, q), t[f"out.idx{n}"])


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_to_the_digit(name):
    with torch.device("meta"):
        network = NextScaleNetwork(PUBLISHED[name])
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[name]


def test_small_scales_are_small_pictures():
    _, t = var_case("tok/decode_multires")
    tokenizer, counts = var_tokenizer(), [h * w for h, w in SIDES]
    tokens = [one.view(1, h, w) for one, (h, w) in zip(t["in.idx"].split(counts, dim=1), SIDES, strict=True)]
    with torch.no_grad():
        sums = tokenizer.quantize.growing(tokens)
        close(sums[-1], t["out.f_hat_last"], 1e-5)
        for k, one in enumerate(sums):
            close(tokenizer.decode_sum(one)[:, :, ::4, ::4], t[f"out.image{k}_sub4"])
