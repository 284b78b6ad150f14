"""A block's sampling, compiled and recorded: the same numbers, and nothing is compiled or recorded twice."""

from functools import partial

import pytest
import torch
from tiny_model import tiny_model

from bitdance.generate import generate_bits
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import SAMPLERS, draws
from bitdance.heads.diffusion.settings import Sampling

pytestmark = pytest.mark.slow

PROMPTS = ["a red cube", "x", "a blue ball on a table, seen from far away", "two cats", "rain"]


def seeded(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def inputs(model, sampling, B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config = model.head.config
    rows = 2 * B if sampling.guided else B
    shape = (draws(sampling.sampler, sampling.steps), B, config.parallel_num, config.ch_target)
    return (
        torch.randn(rows, config.parallel_num, config.ch_cond, generator=generator),
        torch.randn(shape, generator=generator),
    )


def lively(model):
    """Fresh heads predict 0 whatever they see."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def test_any_batch_prompt_and_guidance_is_compiled_once(monkeypatch):
    compiled = []
    counting = lambda graph, example: compiled.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    torch._dynamo.reset()
    model = lively(tiny_model())
    fast, plain = BlockSampler(model.head, compile=True), BlockSampler(model.head, compile=False)
    for count in (2, 4, 3, 5, 1):
        for sampling in (Sampling(2, 3.0), Sampling(3, 3.0, guidance_interval=(0.3, 1.0))):
            found, expected = (
                generate_bits(model, PROMPTS[:count], 4, 4, sampling, seeded(count), block_sampler=sampler)
                for sampler in (fast, plain)
            )
            assert torch.equal(found, expected)
    assert len(compiled) == 2  # many rows, and the single conditional row outside the interval


def test_where_nothing_can_be_compiled_the_head_runs_as_it_is(monkeypatch):
    def broken(graph, example):
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    torch._dynamo.reset()
    model, sampling = lively(tiny_model()), Sampling(2, 3.0)
    sampler, arguments = BlockSampler(model.head, compile=True), inputs(model, sampling, 2)
    with pytest.warns(UserWarning, match="runs uncompiled.*no compiler on this machine"):
        found = sampler(*arguments, sampling, 2)
    assert torch.equal(found, BlockSampler(model.head, compile=False)(*arguments, sampling, 2))


def test_times_are_embedded_once_and_follow_the_weights():
    model, sampling = lively(tiny_model()), Sampling(3, 3.0)
    sampler, calls = BlockSampler(model.head), []
    model.head.net.time_embed.register_forward_hook(lambda *_: calls.append(1))
    cond, noise = inputs(model, sampling, 2)
    before = sampler(cond, noise, sampling, 3)
    for _ in range(3):
        assert torch.equal(sampler(cond, noise, sampling, 3), before)
    assert len(calls) == 4  # 0, 0.95/3, 1.9/3, 0.95
    with torch.no_grad():
        for parameter in model.head.net.time_embed.parameters():
            parameter.mul_(2.0)
    after = sampler(cond, noise, sampling, 3)
    assert len(calls) == 8 and not torch.equal(after, before)
    assert torch.equal(after, BlockSampler(model.head)(cond, noise, sampling, 3))


def test_rows_outside_the_guidance_interval_are_halved():
    model, rows = lively(tiny_model()), []
    model.head.net.register_forward_hook(lambda net, args, out: rows.append(len(out)))
    sampling = Sampling(4, 3.0, guidance_interval=(0.4, 0.8))
    BlockSampler(model.head)(*inputs(model, sampling, 3), sampling, 4)
    assert rows == [3, 3, 6, 6, 3]  # 0, 0.2375, 0.475, 0.7125, 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_replayed_graph_is_the_loop(name):
    model, sampling = lively(tiny_model()).to("cuda"), Sampling(4, 3.0, name)
    fast, plain = BlockSampler(model.head), BlockSampler(model.head, compile=False)
    for seed in range(3):
        cond, noise = (x.cuda() for x in inputs(model, sampling, 2, seed))
        torch.testing.assert_close(fast(cond, noise, sampling, 4), plain(cond, noise, sampling, 4), rtol=1e-3, atol=1e-3)
    assert len(fast._graphs) == 1
    first = fast(cond, noise, sampling, 4)
    fast(cond + 1, noise, sampling, 4)
    torch.testing.assert_close(fast(cond, noise, sampling, 4), first, rtol=0, atol=0)


@pytest.mark.gpu
def test_graphs_serve_all_prompts_and_memory_stays():
    model, sampling = lively(tiny_model()).to("cuda"), Sampling(3, 3.0)
    sampler = BlockSampler(model.head)
    generate_bits(model, PROMPTS[:4], 8, 8, sampling, seeded(4), block_sampler=sampler)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for i in range(20):
        generate_bits(model, [PROMPTS[(i + j) % 5] for j in range(4)], 8, 8, sampling, seeded(4, i), block_sampler=sampler)
    torch.cuda.synchronize()
    assert len(sampler._graphs) == 1
    assert torch.cuda.memory_reserved() <= before + (1 << 20)
