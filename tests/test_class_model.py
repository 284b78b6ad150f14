"""Class-conditional models: published sizes, what a block may see, the cached loop, batches, draws, cancelled pictures."""

import dataclasses

import pytest
import torch
from class_model import golden_config, golden_model, random_bits
from golden_cases import case

from bitdance.heads.diffusion.settings import Sampling
from bitdance.kinds.class_patch.config import PUBLISHED, ClassPatchConfig, published_name
from bitdance.kinds.class_patch.generate import generate_bits
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from bitdance.kinds.class_patch.settings import PRESETS, ClassSettings, choose

pytestmark = pytest.mark.slow

COUNTS = {"B-1x": 242_373_152, "B-4x": 260_102_432, "B-16x": 260_111_648, "L-1x": 527_271_968, "H-1x": 1_007_960_352}
GUIDED = ClassSettings(Sampling(2, 3.0))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameters(name):
    config, _ = PUBLISHED[name]
    with torch.device("meta"):
        model = ClassPatchModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
    assert published_name(config) == name
    assert published_name(dataclasses.replace(config, num_classes=10)) == name
    assert ClassPatchConfig.from_dict(config.to_dict()) == config


def test_the_published_guidance_and_steps_are_presets():
    published = {name: preset for name, preset in PRESETS.items() if name not in ("quick", "instant")}
    guidance = {name: preset.sampling.guidance for name, preset in published.items()}
    assert guidance == {"B-1x": 3.2, "B-4x": 3.9, "B-16x": 6.1, "L-1x": 4.0, "H-1x": 4.55}
    assert {preset.sampling.steps for preset in published.values()} == {100}
    assert [(PRESETS[name].steps, PRESETS[name].guidance) for name in ("quick", "instant")] == [(2, 1.0), (1, 1.0)]


def test_what_was_said_wins_over_preset_and_defaults():
    defaults = {"guidance_scale": 3.2, "num_inference_steps": 100, "cfg_schedule": "constant"}
    assert choose(defaults) == ClassSettings(Sampling(100, 3.2), "constant")
    assert choose(defaults, "B-16x", steps=7) == ClassSettings(Sampling(7, 6.1))
    assert choose({}, cfg_schedule="constant", guidance=2).sampling == Sampling(100, 2)
    with pytest.raises(ValueError, match="allowed are B-1x, B-4x"):
        choose({}, "fast")
    with pytest.raises(ValueError, match=r'"defaults" of bitdance.json: steps = 0'):
        choose({"num_inference_steps": 0})
    with pytest.raises(ValueError, match="cfg_schedule = 'cosine'; allowed are linear, constant"):
        choose({}, cfg_schedule="cosine")


def test_guidance_rises_from_none_at_the_first_block():
    assert [sampling.guidance for sampling, _ in GUIDED.blocks(4)] == [1, 1.5, 2, 2.5]
    assert [sampling.guidance for sampling, _ in ClassSettings(Sampling(2, 3.0), "constant").blocks(2)] == [3, 3]
    assert [sampling.guidance for sampling, _ in ClassSettings(Sampling(2, 0.5)).blocks(2)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 3}, "dim = 32 in n_head = 3 heads"),
        ({"parallel_num": 5}, "64 tokens are no multiple of parallel_num = 5"),
        ({"parallel_num": 8}, "square patch"),
        ({"parallel_mode": "spiral"}, "allowed are patch, standard"),
        ({"class_dropout_prob": 2}, "a number from 0 to 1 is allowed"),
        ({"dim": True}, "dim = True; a whole number"),
        ({"colour": 1}, "unknown keys"),
    ],
)
def test_a_wrong_config_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ClassPatchConfig.from_dict(golden_config(1).to_dict() | change)


@pytest.mark.parametrize("P", [1, 4, 16])
def test_a_block_is_predicted_from_the_blocks_before_it_alone(P):
    """Nothing leaks: a change in block m changes no condition up to its own, and the one behind it."""
    model = golden_model(P)
    bits_BNC, m = model.config.plan.order(random_bits(1, model.config)), 1
    changed = bits_BNC.clone()
    changed[:, m * P : (m + 1) * P] *= -1
    with torch.no_grad():
        before, after = (model.conditions(bits, torch.tensor([3])) for bits in (bits_BNC, changed))
    assert torch.equal(before[:, : (m + 1) * P], after[:, : (m + 1) * P])
    behind = (before - after).abs().amax(dim=(0, 2))[(m + 1) * P : (m + 2) * P]
    assert bool((behind > 1e-4).all())


@pytest.mark.parametrize("P", [1, 4, 16])
def test_the_cached_loop_equals_recomputing_everything(P, monkeypatch):
    model, conditions = golden_model(P), []
    prepare = model.head.prepare
    monkeypatch.setattr(model.head, "prepare", lambda cond: conditions.append(cond) or prepare(cond))
    bits = generate_bits(model, [3, 5], dataclasses.replace(GUIDED, cfg_schedule="constant"), [generator(1), generator(2)])
    bits_BNC, null = model.config.plan.order(bits), model.null_class
    with torch.no_grad():
        expected = model.conditions(bits_BNC.repeat(2, 1, 1), torch.tensor([3, 5, null, null]))
    assert len(conditions) == model.config.num_blocks
    torch.testing.assert_close(torch.cat(conditions, dim=1), expected, rtol=0, atol=2e-5)


def test_a_picture_does_not_depend_on_its_neighbours():
    model = golden_model(16)
    together = generate_bits(model, [1, 7, 3], GUIDED, [generator(seed) for seed in (5, 6, 7)])
    for i, (label, seed) in enumerate(((1, 5), (7, 6), (3, 7))):
        assert torch.equal(generate_bits(model, [label], GUIDED, [generator(seed)]), together[i : i + 1])
    assert not torch.equal(together[0], together[1])


def test_one_seed_gives_the_published_draws():
    """The recorded run drew from one generator seeded with its seed; so does ours, for one picture."""
    info, t = case("imagenet_1x/sample_cfg1.0_linear")
    settings = ClassSettings(Sampling(info["sample_steps"], info["cfg_scale"]), info["cfg_schedule"])
    bits = generate_bits(golden_model(1), t["in.class_id"].tolist(), settings, [generator(info["seed"])])
    assert torch.equal(bits, t["out.bits"].float())


def test_the_first_block_of_a_guided_picture_draws_for_both_branches():
    """As in the published loop: one draw of two rows per step in the first block, of one row later."""
    model, shapes, own = golden_model(4), [], torch.Generator().manual_seed(9)

    def noise(rows):
        shapes.append(rows)
        return torch.randn((rows, 4, model.config.latent_dim), generator=own)

    replayed = generate_bits(model, [3], GUIDED, [torch.Generator()], noise=noise)
    assert shapes == [2] * 3 + [1] * 3 * (model.config.num_blocks - 1)
    assert torch.equal(generate_bits(model, [3], GUIDED, [generator(9)]), replayed)


def test_a_cancelled_picture_costs_no_more_work_and_its_neighbours_nothing():
    model, cancelled, rows = golden_model(16), set(), []
    whole = generate_bits(model, [1, 2], GUIDED, [generator(1), generator(2)])

    def on_block(done, M, bits):
        if done == 2:
            cancelled.add(0)

    hook = model.norm.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    try:
        found = generate_bits(model, [1, 2], GUIDED, [generator(1), generator(2)], on_block, cancelled=cancelled)
        assert rows == [4, 4, 2, 2]
        rows.clear()
        generate_bits(model, [1, 2], GUIDED, [generator(1), generator(2)], cancelled={0, 1})
        assert rows == [4]
    finally:
        hook.remove()
    assert torch.equal(found[1], whole[1])
    tokens = model.config.plan.order(found[:1])
    assert torch.equal(tokens[:, :32], model.config.plan.order(whole[:1])[:, :32])
    assert not tokens[:, 32:].any()


def test_fresh_weights_learn():
    config = dataclasses.replace(golden_config(4), diff_batch_mul=1)
    model = ClassPatchModel(config, generator(0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    bits, classes = random_bits(2, config), torch.tensor([0, 9])
    losses = []
    for _ in range(60):
        loss = model.losses(bits, classes, ClassNoise.draw(2, config, True, generator(1)))["bits"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_training_draws_do_not_depend_on_what_was_asked_before():
    config = golden_config(4)
    one, two = (ClassNoise.draw(3, config, True, generator(4)) for _ in range(2))
    assert torch.equal(one.noise_KPC, two.noise_KPC) and torch.equal(one.flipped_BNC, two.flipped_BNC)
    assert one.noise_KPC.shape == (3 * config.num_blocks * config.diff_batch_mul, 4, 8)
    quiet = ClassNoise.draw(3, config, False, generator(4))
    assert quiet.flipped_BNC is None and quiet.dropped_B is None
