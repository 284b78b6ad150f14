"""The autoregressive loop: what it computes, what it may depend on, what it must not waste."""

from functools import partial

import pytest
import torch
from golden_cases import GOLDEN
from tiny_model import tiny_model

import bitdance.networks.attention
from bitdance.folder.checkpoint import load_model
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.sampler import euler_maruyama, guided_velocity
from bitdance.heads.diffusion.settings import Sampling
from bitdance.sequence.mask import dense_mask
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import conditional_ids, unconditional_ids, vision_prefix_ids
from lfq_tokenizer import binarize

PROMPTS = ["a red cube", "x", "a blue ball on a table, seen from far away", "two cats"]


@pytest.fixture(scope="module")
def published():
    """Recorded weights: their pictures react to everything. Tests that hook into a model take `tiny_model()`."""
    return load_model(GOLDEN / "t2i_ckpt", "cpu")


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def watch(model):
    """Every backbone call: (inputs, positions, mask), and every condition the head gets."""
    calls, conditions = [], []
    model.backbone.register_forward_hook(lambda module, args, output: calls.append(args))
    prepare = model.head.prepare
    model.head.prepare = lambda cond: conditions.append(cond) or prepare(cond)
    return calls, conditions


def recompute(model, prompt, h, w, steps, guidance, generator):
    """The same without cache, batch or padding: every block reruns the whole sequence under the dense mask."""
    plan = PatchPlan(h, w, model.patch_side)
    P, (row, col) = plan.block_size, plan.coordinates()
    prefix = vision_prefix_ids(model.special, h, w, P)
    texts = [conditional_ids(model.text_tokenizer, prompt), unconditional_ids(model.text_tokenizer)]
    tokens, conditions = torch.zeros(1, 0, model.projector.bits), []
    for m in range(plan.num_blocks):
        hidden, here = [], slice(m * P, (m + 1) * P)
        for text in texts[: 2 if guidance > 1 else 1]:
            ids = torch.tensor([text + prefix])
            done = m * P
            inputs = torch.cat([model.backbone.embed(ids), model.embed_image(tokens, row[:done], col[:done])], dim=1)
            block = torch.full((1, inputs.shape[1]), -1)
            block[0, len(text) + 2 :] = torch.arange(inputs.shape[1] - len(text) - 2) // P
            mask = dense_mask(torch.zeros_like(block), block)
            hidden.append(model.backbone(inputs, torch.arange(inputs.shape[1])[None], mask)[:, -P:])
        conditions.append(torch.cat(hidden) + sincos_2d(row[here], col[here], inputs.shape[-1]))
        embedded = model.head.prepare(conditions[-1])

        noise = partial(torch.randn, (1, P, model.projector.bits), generator=generator)
        denoise = lambda x, t, _, e=embedded: model.head.denoise(x, model.head.embed_time(t), e)  # noqa: E731
        x = euler_maruyama(partial(guided_velocity, denoise, guidance=guidance), noise(), steps, noise)
        tokens = torch.cat([tokens, binarize(x)], dim=1)
    return plan.unorder(tokens), conditions


@pytest.mark.parametrize(("P", "h", "w", "guidance"), [(4, 4, 6, 3.0), (4, 6, 4, 1.0), (16, 8, 4, 3.0), (1, 2, 3, 3.0)])
@torch.no_grad()
def test_cached_generation_equals_recomputing_everything(P, h, w, guidance):
    model = tiny_model(P=P)
    expected, expected_conditions = recompute(model, PROMPTS[0], h, w, 3, guidance, *seeded(5))
    _, conditions = watch(model)
    bits = generate_bits(model, PROMPTS[:1], h, w, Sampling(3, guidance), seeded(5))
    for ours, theirs in zip(conditions, expected_conditions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch.equal(bits, expected)
    assert set(bits.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_same_seed_alone_or_in_a_batch_with_other_prompts(published, guidance):
    together = generate_bits(published, PROMPTS, 8, 6, Sampling(4, guidance), seeded(11, 12, 13, 14))
    for i, prompt in enumerate(PROMPTS):
        alone = generate_bits(published, [prompt], 8, 6, Sampling(4, guidance), seeded(11 + i))
        assert torch.equal(alone[0], together[i])
    assert len({tuple(bits.flatten().tolist()) for bits in together}) == 4


@torch.no_grad()
def test_cached_generation_equals_recomputing_everything_with_published_weights(published):
    expected, _ = recompute(published, PROMPTS[0], 8, 6, 4, 7.5, *seeded(5))
    assert torch.equal(generate_bits(published, PROMPTS[:1], 8, 6, Sampling(4, 7.5), seeded(5)), expected)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (0.0, 2), (5.0, 4)])
def test_backbone_runs_once_per_block_with_cond_and_uncond_in_one_call(guidance, rows):
    model = tiny_model()
    calls, _ = watch(model)
    generate_bits(model, PROMPTS[:2], 4, 6, Sampling(2, guidance), seeded(1, 2))
    assert len(calls) == 6  # prefix with block 0, then five blocks; the sixth predicts nothing
    assert [len(args[0]) for args in calls] == [rows] * 6
    assert [args[0].shape[1] for args in calls[1:]] == [4] * 5


def test_positions_run_on_per_row_without_padding():
    model = tiny_model()
    calls, _ = watch(model)
    generate_bits(model, PROMPTS[:1], 4, 4, Sampling(2, 5.0), seeded(1))
    lengths = [
        len(text) + 2 + 4 for text in (conditional_ids(model.text_tokenizer, PROMPTS[0]), unconditional_ids(model.text_tokenizer))
    ]
    for row, length in enumerate(lengths):
        positions = torch.cat([args[1][row] for args in calls])[-(length + 3 * 4) :]
        assert positions.tolist() == list(range(length + 3 * 4))


def test_blocks_pass_no_mask_whether_or_not_there_is_padding(monkeypatch):
    """A mask would shut out the flash kernels and repeat the keys of grouped queries."""
    model, seen = tiny_model(), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *args, attn_mask=None, **kwargs):
        seen.append((query.shape[1], key.shape[1], attn_mask is None and not args))
        return attend(query, key, value, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(bitdance.networks.attention, "scaled_dot_product_attention", watched)
    for prompts in (PROMPTS[:1] * 2, PROMPTS[:2]):
        seen.clear()
        generate_bits(model, prompts, 4, 4, Sampling(2, 1.0), seeded(1, 2))
        layers, runs = model.backbone.lm.config.num_hidden_layers, len(set(prompts))
        assert len(seen) == 3 * layers * runs  # of four blocks the first comes with the prefix
        assert all(unmasked and heads == key_heads for heads, key_heads, unmasked in seen)


@pytest.mark.parametrize("padding", [[0, 0, 0], [3, 3, 0], [0, 2, 5]])
@torch.no_grad()
def test_padding_is_hidden_as_by_a_mask(padding):
    backbone, L, P = tiny_model().backbone, 7, 4
    inputs = torch.randn(3, L + P, backbone.hidden_size, generator=seeded(3)[0])
    hidden = torch.tensor(padding)[:, None]
    position = (torch.arange(L + P) - hidden).clamp(min=0)
    seen = (torch.arange(L + P) >= hidden)[:, None, None]
    mask = torch.ones(L, L, dtype=torch.bool).tril() & (seen[..., :L] | torch.eye(L, dtype=torch.bool))
    found = []
    for cache, how in (
        (backbone.new_cache(), {"mask": seen.expand(-1, -1, P, -1)}),
        (backbone.new_cache(L + P), {"padding": padding}),
    ):
        backbone(inputs[:, :L], position[:, :L], mask, cache)
        found.append(backbone(inputs[:, L:], position[:, L:], cache=cache, causal=False, **how))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_a_full_cache_says_so():
    backbone = tiny_model().backbone
    cache = backbone.new_cache(5)
    with pytest.raises(ValueError, match="8 positions do not fit into a cache of 5"):
        backbone(torch.zeros(1, 8, backbone.hidden_size), cache=cache)


def test_word_scores_are_never_computed():
    model = tiny_model()

    def fail(*_):
        raise AssertionError("the vocabulary head ran")

    model.backbone.lm.get_output_embeddings().register_forward_pre_hook(fail)
    generate_bits(model, PROMPTS[:1], 4, 4, Sampling(2, 3.0), seeded(1))


def test_every_setting_has_an_effect(published):
    def bits(prompt=PROMPTS[0], steps=4, guidance=7.5, seed=1, sampler="euler_maruyama"):
        return generate_bits(published, [prompt], 8, 8, Sampling(steps, guidance, sampler), seeded(seed))

    base = bits()
    assert torch.equal(base, bits())
    for changed in (
        bits(prompt=PROMPTS[2]),
        bits(prompt=""),
        bits(seed=2),
        bits(guidance=1.0),
        bits(guidance=3.0),
        bits(steps=5),
        bits(sampler="euler"),
    ):
        assert (changed != base).float().mean() > 0.05


def test_each_block_reports_the_bits_so_far():
    model, seen = tiny_model(), []
    bits = generate_bits(model, PROMPTS[:2], 4, 4, Sampling(2, 3.0), seeded(1, 2), on_block=lambda *args: seen.append(args))
    plan = PatchPlan(4, 4, 2)
    assert [(done, total) for done, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for done, _, so_far in seen:
        tokens, final = plan.order(so_far), plan.order(bits)
        assert torch.equal(tokens[:, : done * 4], final[:, : done * 4])
        assert not tokens[:, done * 4 :].any()


def test_an_exception_in_the_callback_ends_the_run_and_the_next_run_is_untouched():
    model = tiny_model()
    expected = generate_bits(model, PROMPTS[:1], 4, 4, Sampling(2, 3.0), seeded(1))

    def stop(done, total, bits):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_bits(model, PROMPTS[:1], 4, 4, Sampling(2, 3.0), seeded(1), on_block=stop)
    assert torch.equal(generate_bits(model, PROMPTS[:1], 4, 4, Sampling(2, 3.0), seeded(1)), expected)


def test_the_global_generator_is_left_alone():
    model, state = tiny_model(), torch.get_rng_state()
    generate_bits(model, PROMPTS[:1], 4, 4, Sampling(2, 3.0), seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="euler_maruyama, euler"):
        Sampling(2, 3.0, sampler="leapfrog")
    with pytest.raises(ValueError, match="2 prompts and 1 generators"):
        generate_bits(model, PROMPTS[:2], 4, 4, Sampling(2, 3.0), seeded(1))
    with pytest.raises(ValueError, match="multiples of 2"):
        generate_bits(model, PROMPTS[:1], 4, 5, Sampling(2, 3.0), seeded(1))
    with pytest.raises(ValueError, match="has no name"):
        generate_bits(model, PROMPTS[:1], 4, 14, Sampling(2, 3.0), seeded(1))
