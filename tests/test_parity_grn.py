"""Parity with the published refinement models: networks, losses, gradients, whole generations (tests/golden/grn/PARITY.md)."""

from dataclasses import replace

import pytest
import torch
from grn_cases import class_network, close, grn_case, hbq_tokenizer, recorded, text_network, weights

from bitdance.folder.published import flat_blocks
from bitdance.kinds.refine import loop
from bitdance.kinds.refine.class_network import position_table
from bitdance.kinds.refine.config import PUBLISHED, PUBLISHED_TEXT
from bitdance.kinds.refine.labels import bits_of, label_major, labels_of, value_major
from bitdance.kinds.refine.loop import OwnDraws, refine
from bitdance.kinds.refine.model import build_network, label_losses
from bitdance.kinds.refine.noise import RefineNoise, times
from bitdance.kinds.refine.predictors import ClassPredictor, TextPredictor
from bitdance.kinds.refine.settings import AdaptiveSteps, RefineSettings
from bitdance.kinds.refine.text_network import RATIOS, grid_of, grid_places, picture_turns, text_turns, time_turns
from bitdance.networks import text_encoder
from bitdance.networks.text_encoder import PromptReader, TextEncoder, transformers_name, width_of
from lfq_tokenizer.hierarchical import hierarchical_bits, hierarchical_values
from lfq_tokenizer.json_file import write_json
from lfq_tokenizer.weights import write_safetensors

NAMES = recorded()["cases"]
LOGITS = tuple(name for name in NAMES if name.startswith("c2i/logits"))
LOSSES = ("c2i/train_ind", "c2i/train_bit")
CLASS_SAMPLES = tuple(name for name in NAMES if name.startswith("c2i/sample"))
TEXT_SAMPLES = tuple(name for name in NAMES if name.startswith("t2i_") and "/sample" in name)
TEXT_LOSSES = tuple(name for name in NAMES if name.startswith("t2i_") and "/train" in name)


def form_of(name):
    return "ind" if "_ind" in name else "bit"


def test_one_hot_layouts_are_the_recorded_ones():
    info, t = grn_case("onehot")
    assert torch.equal(value_major(t["in.labels"], info["num_classes"]).float(), t["out.class_major"])
    found = label_major(t["in.labels"], info["num_classes"]).transpose(1, 2).unflatten(2, t["in.labels"].shape[2:])
    assert torch.equal(found.float(), t["out.channel_major"])


@pytest.mark.parametrize("name", LOGITS)
def test_logits_and_inner_states_match_published(name):
    _, t = grn_case(name)
    network, seen = class_network(form_of(name)), {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, key=key: seen.__setitem__(key, out))
        for key, module in {
            "t_emb": network.t_embedder,
            "x_embed": network.x_embedder,
            **{f"block{i}": network.blocks[i] for i in (0, 2, 3)},
        }.items()
    ]
    with torch.no_grad():
        logits = network(t["in.labels"], t["in.t"], t["in.y"])
    for hook in hooks:
        hook.remove()
    close(logits.movedim(-1, 1), t["out.logits"], 5e-5)
    close(network.pos_embed[0], t["out.trace.pos_embed"], 0)
    seen["x_embed"] = seen["x_embed"].flatten(2).transpose(1, 2)
    for key, value in seen.items():
        close(value, t[f"out.trace.{key}"])


@pytest.mark.parametrize("form", ["ind", "bit"])
def test_the_position_table_is_the_stored_one(form):
    network = class_network(form)
    close(position_table(network.config.grid, network.config.width), network.pos_embed[0], 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_class_losses_and_gradients_match_published(name):
    info, t = grn_case(name)
    network = class_network(form_of(name))
    network.zero_grad()
    times_B = times(t["draw1"][0], network.config)
    kept = t["draw3"][0] < times_B[:, None, None, None]
    noise = RefineNoise(times_B, t["draw2"][0], kept, t["draw0"][0] < info["label_drop_prob"])
    close(times_B, t["out.t"], 1e-6)
    assert torch.equal(noise.corrupted(t["in.labels"]), t["out.z"])
    losses = label_losses(network, bits_of(t["in.labels"], network.config), t["in.y"], noise)
    close(losses.mean(), t["out.loss"])
    losses.mean().backward()
    gradients = {f"net.{key}": parameter.grad for key, parameter in network.named_parameters()}
    for key, expected in t.items():
        if key.startswith("out.grad."):
            close(gradients[key.removeprefix("out.grad.")], expected, 1e-5)
    assert set(info["grad_norms"]) - {"net.pos_embed"} == set(gradients)
    for key, norm in info["grad_norms"].items():
        if key in gradients:
            assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-4), key


def test_three_steps_of_adamw_match_published():
    info, t = grn_case("c2i/train3_ind")
    network = build_network(class_network("ind").config)
    network.load_state_dict(class_network("ind").state_dict())
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=info["lr"], betas=tuple(info["betas"]), eps=info["eps"], weight_decay=0
    )
    averages = [{key: value.clone() for key, value in network.state_dict().items()} for _ in info["ema_decays"]]
    for k in range(3):
        times_B = times(t["draw1"][k], network.config)
        kept = t["draw3"][k] < times_B[:, None, None, None]
        noise = RefineNoise(times_B, t["draw2"][k], kept, t["draw0"][k] < info["label_drop_prob"])
        loss = label_losses(network, bits_of(t["in.labels"][k], network.config), t["in.y"][k], noise).mean()
        close(loss, t["out.losses"][k])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), info["clip_grad_norm"])
        close(norm, t["out.grad_norms_before_clip"][k], 1e-4)
        optimizer.step()
        for average, decay in zip(averages, info["ema_decays"], strict=True):
            for key, value in network.state_dict().items():
                average[key].mul_(decay).add_(value, alpha=1 - decay)
    for prefix, state in (("out.param.", network.state_dict()), ("out.ema1.", averages[0]), ("out.ema2.", averages[1])):
        found = {key: value for key, value in t.items() if key.startswith(prefix)}
        assert found
        for key, value in found.items():
            close(state[key.removeprefix(prefix + "net.")], value, 2e-5)


class Recorded:
    """Draws replayed; exponentials of a class model stand in the order (B,G,h,w), of a text model in (token, G)."""

    def __init__(self, t, grid, by_token):
        self.t, self.grid, self.by_token, self.step = t, grid, by_token, -1

    def labels(self, pictures):
        drawn = self.t["draw0"][0]
        return (drawn[:, :, 0] if drawn.ndim == 5 else drawn)[list(pictures)]

    def exponential(self, pictures):
        self.step += 1
        q, shape = self.t["draw1"][self.step], self.t["draw2"].shape
        if self.by_token:
            return q.reshape(1, *self.grid, shape[2], -1).movedim(3, 1)
        return q.reshape(*shape[1:], -1)[list(pictures)]

    def uniform(self, pictures):
        drawn = self.t["draw2"][self.step]
        return (drawn[:, :, 0] if drawn.ndim == 5 else drawn)[list(pictures)]


class Watched:
    """A predictor that remembers what it was given and what it answered."""

    def __init__(self, inner):
        self.inner, self.config, self.device, self.calls = inner, inner.config, inner.device, []

    def logits(self, pictures, labels, time, guided):
        found = self.inner.logits(pictures, labels, time, guided)
        self.calls.append((list(pictures), labels, time, found))
        return found


def class_settings(info):
    low, high = info["interval"]
    guided = {"guidance_interval": (low, high)} if low >= 0 else {"guidance_power": -low}
    adaptive = None
    if info["sampling_method"] == "complexity_aware":
        adaptive = AdaptiveSteps(int(info["wp"]), info["k"], info["b"], int(info["tmin"]))
    schedule = "cosine" if info["sampling_method"] == "cosine" else "linear"
    return RefineSettings(info["steps"], info["cfg"], info["tau"], schedule=schedule, adaptive=adaptive, **guided)


@pytest.mark.parametrize("name", CLASS_SAMPLES)
def test_class_generations_match_published(name):
    info, t = grn_case(name)
    network = class_network(form_of(name))
    watched, spent = Watched(ClassPredictor(network, t["in.y"].tolist())), []
    labels = refine(watched, class_settings(info), Recorded(t, (4, 4), by_token=False), len(t["in.y"]), spent=spent)
    for k, (pictures, seen, time, _) in enumerate(watched.calls):
        close(time, t["out.t_steps"][k][pictures], 1e-6)
        assert torch.equal(seen, t["out.z_steps"][k][pictures]), k
    assert torch.equal(labels, t["out.labels"])
    assert spent == info.get("total_steps", [info["steps"]] * 2)
    close(watched.calls[0][3][0].movedim(-1, 1), t["out.logits_cond_first"], 5e-5)
    rounds = info["hbq_round"]
    bits = bits_of(labels, network.config)
    close(hierarchical_values(bits, rounds), t["out.features"], 0)
    assert torch.equal(labels_of(bits, network.config), labels)
    if "out.image" in t:
        with torch.no_grad():
            close(hbq_tokenizer().decode(bits), t["out.image"])


@pytest.mark.parametrize("name", ["c2i/sample_ind", "c2i/sample_bit", "t2i_prefix/sample_bit"])
def test_one_generator_draws_in_the_published_order(name):
    """The recorded draws of a batch are those of one generator; a picture of ours draws the same for itself."""
    info, t = grn_case(name)
    by_token = name.startswith("t2i")
    network = text_network(form_of(name), "prefix") if by_token else class_network(form_of(name))
    grid, g = tuple(info.get("grid", (4, 4))), torch.Generator().manual_seed(info["seed"])
    if by_token:
        draws = OwnDraws([g], network.config, grid, by_token)
        assert torch.equal(draws.labels([0]), t["draw0"][0][:, :, 0])
        assert torch.equal(draws.exponential([0]), Recorded(t, grid, True).exponential([0]))
        assert torch.equal(draws.uniform([0]), t["draw2"][0][:, :, 0])
        return
    # a recorded batch of two draws both at once: ours, one after the other, are the two halves of each draw in turn
    assert torch.equal(torch.randint(0, network.config.values, t["draw0"].shape[1:], generator=g), t["draw0"][0])
    assert torch.equal(torch.empty(t["draw1"][0].shape).exponential_(1, generator=g), t["draw1"][0])
    assert torch.equal(torch.rand(t["draw2"][0].shape, generator=g), t["draw2"][0])


@pytest.mark.parametrize("name", CLASS_SAMPLES)
def test_a_class_picture_draws_label_by_label(name):
    """What one picture draws for itself has the order of a recorded batch of one: labels, then G·N·V numbers, then shares."""
    network = class_network(form_of(name))
    c = network.config
    draws, g = OwnDraws([torch.Generator().manual_seed(3)], c, (4, 4), False), torch.Generator().manual_seed(3)
    assert torch.equal(draws.labels([0]), torch.randint(0, c.values, (1, c.label_count, 4, 4), generator=g))
    q = torch.empty(c.label_count * 16, c.values).exponential_(1, generator=g)
    assert torch.equal(draws.exponential([0]).flatten(0, 3), q)
    assert torch.equal(draws.uniform([0]), torch.rand(1, c.label_count, 4, 4, generator=g))


def text_settings(info):
    joint = info["kind"] == "joint"
    return RefineSettings(
        info["max_infer_steps"],
        info["cfg"],
        info["tau"],
        guidance_interval=(info["cfg_interval"], 1.0),
        schedule="ramp",
        ramp_steps=info["Tmax"],
        share_cap=0.95 if joint else 0.999,
        share_shift=info["snr_shift"],
        end_share=0.98 if joint else 1 - 1e-6,
    )


@pytest.mark.parametrize("name", TEXT_SAMPLES)
def test_text_generations_match_published(name):
    info, t = grn_case(name)
    network = text_network(form_of(name), info["kind"])
    watched, spent = Watched(TextPredictor(network, [t["in.text_cond"]], [t["in.text_uncond"]])), []
    labels = refine(watched, text_settings(info), Recorded(t, info["grid"], by_token=True), 1, spent=spent)
    assert spent == [info["steps_run"]]
    for k, (_, seen, time, found) in enumerate(watched.calls):
        close(time[0], t["out.t_steps"][k], 1e-6)
        assert torch.equal(seen, t["out.z_steps"][k][:, :, 0]), k
        close(loop.entropies(found[0])[0], t["out.entropy"][k], 1e-5)
    first = watched.calls[0][3][0][0].permute(1, 2, 0, 3).flatten(0, 1)
    close(first, t["out.logits_cond_first"], 5e-5)
    assert torch.equal(labels, t["out.labels"][:, :, 0])
    bits = bits_of(labels, network.config)
    close(hierarchical_values(bits, 3), t["out.features"][:, :, 0], 0)
    if "out.image" in t:
        with torch.no_grad():
            close(hbq_tokenizer().decode(bits), t["out.image"][:, :, 0])


def test_positions_of_the_text_model_match_published():
    info, t = grn_case("t2i/rope")
    E, (h, w) = info["head_dim"], info["grid"]
    for found, key in ((picture_turns(h, w, E), "image"), (text_turns(8, E), "text"), (time_turns(E)[0], "t_token")):
        close(found[..., 0], t[f"out.{key}_cos"], 1e-6)
        close(found[..., 1], t[f"out.{key}_sin"], 1e-6)
    for (rows, columns), end in (((h, w), ""), ((16, 16), "_16x16"), ((64, 64), "_64x64"), ((85, 48), "_85x48")):
        places = grid_places(rows, columns)
        assert torch.equal(places[0], t[f"out.row_positions{end}"])
        assert torch.equal(places[1], t[f"out.column_positions{end}"])


@pytest.mark.parametrize("kind", ["prefix", "joint"])
@pytest.mark.parametrize("T", [20, 50])
@pytest.mark.parametrize("shift", [1, 2])
def test_shares_of_the_text_model_match_published(kind, T, shift):
    _, t = grn_case("t2i/schedule")
    cap = 0.95 if kind == "joint" else 0.999
    settings = RefineSettings(50, schedule="ramp", ramp_steps=T, share_cap=cap, share_shift=float(shift))
    found = torch.tensor([settings.share((i + 1) / 50) for i in range(50)])
    close(found, t[f"out.next_{kind}_T{T}_shift{shift}"], 1e-6)


def test_grids_of_the_text_model_match_published():
    info, _ = grn_case("t2i/resolutions")
    sides = {"0.06M": 16, "0.25M": 32, "0.41M": 40, "0.92M": 60, "1M": 64, "2M": 90}
    assert len(info["ratio_h_over_w"]) == len(RATIOS)
    for known, (name, grids) in zip(sorted(RATIOS, reverse=True), info["ratio_h_over_w"].items(), strict=True):
        assert known == pytest.approx(float(name), abs=1e-3)
        for size, grid in grids.items():
            assert list(grid_of(known, sides[size])) == grid, (name, size)


@pytest.mark.parametrize("name", TEXT_LOSSES)
def test_text_losses_and_gradients_match_published(name):
    info, t = grn_case(name)
    network = text_network(form_of(name), info["kind"])
    network.zero_grad()
    order = [t[f"draw{k}"] for k in range(5) if f"draw{k}" in t]
    loss = 0.0
    losses = []
    for i in range(2):
        features = t[f"in.features{i}"][:, :, 0]
        bits = hierarchical_bits(features, 3)
        lognormal = info["log_norm_sigma"] > 0
        config = replace(
            network.config,
            P_mean=info["log_norm_mean"],
            P_std=max(info["log_norm_sigma"], 0),
            time_shift=float(info["alpha"] - 1000),
        )
        drawn = order[0][i] if lognormal else torch.tensor([info["numpy_uniform_draws"][i]])
        nominal = times(drawn.float(), config)
        random, uniform = order[int(lognormal) + 2 * i][0][:, :, 0], order[int(lognormal) + 2 * i + 1][0][:, :, 0]
        noise = RefineNoise(nominal, random, uniform < nominal[:, None, None, None])
        text = t[f"in.text{i}"]
        memory = network.prepare(text[None], [len(text)])
        of_labels = label_losses(network, bits, memory, noise)
        token_loss = of_labels[0].mean(dim=0).flatten()
        losses.append(token_loss)
        loss = loss + token_loss.mean() / 2
        told = noise.kept_BGhw.float().mean() if info["kind"] == "joint" else nominal[0]
        close(told, t["out.t"][i], 1e-6)
    close(torch.cat(losses), t["out.token_loss"], 2e-5)
    close(loss, t["out.loss"], 1e-5)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    for key, expected in flat_blocks(
        {k.removeprefix("out.grad."): v for k, v in t.items() if k.startswith("out.grad.")}, 2
    ).items():
        close(gradients[key], expected, 2e-5)


COUNTS = {
    "B": (130_861_056, 130_746_240),
    "L": (458_549_472, 458_401_888),
    "H": (952_055_104, 951_858_368),
    "G": (2_006_572_432, 2_006_326_544),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_to_the_digit(name):
    with torch.device("meta"):
        for form, count in zip(("ind", "bit"), COUNTS[name], strict=True):
            network = build_network(replace(PUBLISHED[name], labels=form))
            assert sum(t.numel() for t in network.state_dict().values()) == count
        m1 = build_network(replace(PUBLISHED["B"], bits=32, rounds=1, labels="bit"))
        text = build_network(replace(PUBLISHED_TEXT, labels="bit"))
    assert sum(t.numel() for t in m1.state_dict().values()) == 130_688_832
    assert sum(t.numel() for t in text.state_dict().values()) == 2_197_832_448


def test_the_published_umt5_file_is_an_encoder_of_transformers(tmp_path):
    info, t = grn_case("umt5/encode")
    said, state = recorded()["config"]["umt5"], weights("umt5")
    write_json(
        {
            "model_type": "umt5",
            "d_model": said["dim"],
            "d_kv": said["dim_attn"] // said["num_heads"],
            "d_ff": said["dim_ffn"],
            "num_heads": said["num_heads"],
            "num_layers": said["num_layers"],
            "vocab_size": said["vocab_size"],
            "relative_attention_num_buckets": said["num_buckets"],
            "feed_forward_proj": "gated-gelu",
        },
        tmp_path / "config.json",
    )
    write_safetensors({transformers_name(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert width_of(tmp_path) == said["dim"]
    encoder = TextEncoder(text_encoder._t5(tmp_path), PromptReader(None, True), said["dim"], tmp_path)
    for k, length in enumerate(info["lengths"]):
        close(encoder.features(t["in.ids"][k, : int(length)].tolist()), t[f"out.features{k}"], 1e-5)
