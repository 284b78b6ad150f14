"""The figures by which presets are chosen: they see a difference where there is one, and none where there is none."""

import pytest
import torch

from bitdance.heads.diffusion.settings import PRESETS, Sampling, choose
from stages.measure.solvers import difference, parse_setting, variety, work


def drawn(p_KN, seeds, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(p_KN.shape[0], seeds, p_KN.shape[1], generator=generator) < p_KN[:, None]


def test_a_difference_of_probabilities_is_found_and_chance_is_not():
    p_KN = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    reference = drawn(p_KN, 16, 1)
    bias, errors = difference(drawn(p_KN, 16, 2), reference)
    assert bias < 0.02 and abs(errors) < 3  # chance alone makes a root mean square of 0.16
    bias, errors = difference(drawn(p_KN + 0.05, 16, 3), reference)
    assert bias == pytest.approx(0.05, rel=0.15) and errors > 5


def test_variety_is_the_share_of_bits_in_which_two_pictures_differ():
    bits = drawn(torch.full((5, 200), 0.3), 12, 4)
    pairs = [(bits[:, i] ^ bits[:, j]).double().mean() for i in range(12) for j in range(i)]
    assert variety(bits) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-9)
    assert variety(bits[:, :1].expand(-1, 12, -1)) == 0


def test_work_counts_rows_of_the_head():
    assert work(Sampling(4, 3.0), 5, 1.0) == 10  # four steps and the last one, both branches
    assert work(Sampling(4, 1.0), 5, 1.0) == 5
    assert work(Sampling(4, 3.0, "heun"), 5, 1.0) == 18
    assert work(Sampling(4, 3.0, guidance_interval=(0.5, 1.0)), 5, 1.0) == 7  # 0.7125 and 0.95 lie inside
    assert work(Sampling(5, 3.0, last_steps=1), 5, 1.0) == 8  # 5, 4, 3, 2, 1 steps


def test_settings_are_read_and_mistakes_named():
    text = "sampler=heun,steps=5,guidance_interval=0.3:1,last_steps=3"
    assert choose({}, **parse_setting(text)) == Sampling(5, 7.5, "heun", (0.3, 1.0), 3)
    for wrong in ("steps=few", "guidance_interval=0.3", "colour=red", "steps"):
        with pytest.raises(ValueError, match="is none of preset"):
            parse_setting(wrong)


def test_few_evaluations_are_for_models_that_were_taught_them():
    taught = {"preset": "quick", "sampler": "direct", "guidance_scale": 1.0}
    assert choose(taught) == Sampling(2, 1.0, "direct") and choose(taught, "instant") == Sampling(1, 1.0, "direct")
    assert choose(taught, steps=4).steps == 4 and choose({"sampler": "direct"}, "quick").steps == 2
    for wrong in ({"preset": "quick"}, {"sampler": "direct"}):
        with pytest.raises(ValueError, match="needs a model that was distilled to few evaluations"):
            choose({}, **wrong)
    for wrong in ({"preset": "fast"}, {"sampler": "euler"}):
        with pytest.raises(ValueError, match="with a model that was distilled to few evaluations; it takes 'direct' alone"):
            choose(taught, **wrong)


def test_the_pipeline_is_asked_for_exactly_this():
    for sampling in (*PRESETS.values(), Sampling(5, 2.0, "heun", (0.2, 0.9), 3)):
        said = sampling.arguments()
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
        taught = {"sampler": "direct"} if sampling.sampler == "direct" else {}
        chosen = choose({"preset": "published", **taught}, **{names.get(name, name): value for name, value in said.items()})
        assert chosen == sampling.changed(last_steps=sampling.last_steps or sampling.steps)
