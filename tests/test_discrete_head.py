"""What a class model is compared with: heads of logits (probabilities, losses, guidance, sampling), causal attention."""

import math
from dataclasses import replace

import pytest
import torch
from class_model import golden_config

from bitdance.heads.diffusion.settings import Sampling
from bitdance.heads.discrete import DiscreteHead, DiscreteSampler, bits_of, number_of
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.generate import generate_bits
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from bitdance.kinds.class_patch.settings import ClassSettings


def head(kind: str, bits: int = 3, width: int = 8) -> DiscreteHead:
    made = DiscreteHead(kind, bits, width)
    made.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.out.weight.mul_(60)
    return made


def test_numbers_and_bits_are_each_other_s_reverse() -> None:
    numbers = torch.arange(8)
    assert torch.equal(number_of(bits_of(numbers, 3)), numbers) and bits_of(torch.tensor(1), 3).tolist() == [1, -1, -1]


@pytest.mark.parametrize("kind", ["bits", "values"])
def test_bits_are_drawn_with_the_probabilities_of_the_logits(kind: str) -> None:
    made, cond = head(kind), torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1))
    count = 40_000
    noise = torch.randn(1, count, 1, 3, generator=torch.Generator().manual_seed(2))
    drawn = DiscreteSampler(made)(cond.expand(count, -1, -1), noise, Sampling(1, 1.0), 1)
    found = torch.bincount(number_of(drawn).flatten(), minlength=8) / count
    logits = made(cond)[0, 0]
    if kind == "values":
        expected = logits.softmax(0)
    else:
        up = logits.sigmoid()
        signs = bits_of(torch.arange(8), 3)
        expected = torch.where(signs > 0, up, 1 - up).prod(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * math.sqrt(0.25 / count))
    target = bits_of(torch.arange(8), 3)[:, None]
    loss = made.loss_at(target, cond.expand(8, -1, -1))[:, 0]
    torch.testing.assert_close(loss, -expected.log() / 3, rtol=1e-4, atol=1e-4)  # nats per bit


def test_guidance_mixes_the_logits_of_both_branches() -> None:
    made = head("bits")
    cond = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 1, 1, 3, generator=torch.Generator().manual_seed(2))
    with_condition, without = made(cond)
    threshold = torch.special.ndtr(noise[0, 0]).logit()
    expected = torch.where(without + 2.5 * (with_condition - without) > threshold, 1.0, -1.0)
    assert torch.equal(DiscreteSampler(made)(cond, noise, Sampling(1, 2.5), 1)[0], expected)


@pytest.mark.parametrize("kind", ["bits", "values"])
@pytest.mark.parametrize("P", [1, 4])
def test_a_class_model_learns_and_samples_with_it(kind: str, P: int) -> None:
    shape = replace(golden_config(P), head_kind=kind, diff_batch_mul=1, perturb_rate=0.5, class_dropout_prob=0.0)
    torch.manual_seed(0)
    model = ClassPatchModel(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bits = torch.randint(2, (2, shape.latent_dim, shape.grid, shape.grid)).float() * 2 - 1  # two pictures, by heart
    classes, losses = torch.tensor([0, 1]), []
    for _ in range(160):
        loss = model.losses(bits, classes, ClassNoise.draw(2, shape, True))["bits"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2), abs=0.15) and losses[-1] < 0.3
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    made = generate_bits(model.eval(), [0, 1], ClassSettings(Sampling(1, 1.0)), generators)
    assert float((made == bits).float().mean()) > 0.9
    again = generate_bits(model, [1], ClassSettings(Sampling(1, 1.0)), [torch.Generator().manual_seed(1)])
    assert torch.equal(again[0], made[1])  # whatever its neighbours


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 16 bits"):
        DiscreteHead("values", 32, 8)
    with pytest.raises(ValueError, match="allowed are diffusion, bits, values"):
        replace(golden_config(1), head_kind="gauss")
    with pytest.raises(ValueError, match="set it to 1"):
        replace(golden_config(1), head_kind="bits", diff_batch_mul=4)
    assert ClassPatchConfig.from_dict(golden_config(1).to_dict()).head_kind == "diffusion"


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_a_block_is_predicted_as_in_training_whatever_it_may_see(attention: str) -> None:
    shape = replace(golden_config(4), attention=attention)
    model = ClassPatchModel(shape, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wqkv.weight.mul_(20)  # so that it matters who sees whom
    bits = torch.randint(2, (2, shape.num_tokens, shape.latent_dim), generator=torch.Generator().manual_seed(1)).float() * 2 - 1
    classes, P, memory = torch.tensor([0, 1]), shape.parallel_num, model.new_memory()
    with torch.no_grad():
        whole = model.conditions(bits, classes)
        steps = [model.prefix(classes, memory) + model.place(0)]
        for m in range(shape.num_blocks - 1):
            steps.append(model.extend(bits[:, m * P : (m + 1) * P], m, memory) + model.place(m + 1))
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)
        changed = bits.clone()
        changed[:, P - 1] *= -1  # the last token of the first block
        moved = (model.conditions(changed, classes) - whole)[:, P : 2 * P].abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == ([True] * P if attention == "block" else [False] * (P - 1) + [True])
