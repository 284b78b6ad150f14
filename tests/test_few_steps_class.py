"""Few evaluations for a class model: only the head learns, exact resuming, what is saved makes pictures, and who is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_class_training import config, home  # noqa: F401 (a fixture)
from test_engine import assert_same

from bitdance import load_pipeline
from distill.cli import main
from distill.few_steps_class import FewStepsRecipe
from distill.few_steps_config import DistillClassConfig, FewSteps
from stages.engine import checkpoint
from stages.engine.loop import train
from stages.recipes.class_patch.recipe import ClassPatchRecipe

pytestmark = pytest.mark.slow


@pytest.fixture
def teacher(home: Path, tmp_path: Path) -> Path:  # noqa: F811
    settings = config(home, "bits", str(tmp_path / "teacher"), steps=2, defaults={"guidance_scale": 3.0})
    train(ClassPatchRecipe(settings), settings)
    return tmp_path / "teacher"


def few(home: Path, teacher: Path, out: str, few_steps: FewSteps | None = None, **changes: Any) -> DistillClassConfig:  # noqa: F811
    """The config of the class model's tests with a teacher."""
    base = config(home, "bits", str(teacher.parent / out), init=str(teacher), **changes)
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.name != "recipe"}
    return DistillClassConfig("few_steps_class", **values, few_steps=few_steps or FewSteps(steps=3))


def test_only_the_head_learns_and_pictures_come_of_it(home: Path, teacher: Path) -> None:  # noqa: F811
    settings = few(home, teacher, "student", FewSteps(steps=3, guidance=2.0), steps=3, lr=1e-2)
    train(FewStepsRecipe(settings), settings)
    pipe, before = (load_pipeline(checkpoint.model_folder(place), "cpu") for place in (teacher.parent / "student", teacher))
    for name, tensor in pipe.model.network.state_dict().items():
        same = torch.equal(tensor, before.model.network.state_dict()[name])
        assert same or name.startswith("head."), name
        assert not same or not name.endswith("final_layer.linear.weight")
    assert pipe.model.defaults == {"guidance_scale": 1.0, "num_inference_steps": 2, "sampler": "direct"}
    said = pipe.model.extras["card"]["few_steps"]
    assert said["guidance"] == 2.0 and said["cfg_schedule"] == "linear"
    two = pipe("bee", seed=1, output_type="tokens").bits
    assert two is not None and set(two.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(pipe("bee", seed=1, output_type="tokens", preset="quick").bits, two)
    assert pipe("bee", seed=1, output_type="tokens", preset="instant").bits.shape == two.shape
    with pytest.raises(ValueError, match="distilled to few evaluations; it takes 'direct' alone"):
        pipe("bee", sampler="euler")
    with pytest.raises(ValueError, match="was distilled to few evaluations itself"):
        FewStepsRecipe(few(home, teacher.parent / "student", "again"))


def test_a_resumed_run_equals_an_unbroken_one(home: Path, teacher: Path) -> None:  # noqa: F811
    for name, stops in (("whole", [4]), ("broken", [2, 4])):
        for steps in stops:
            settings = few(home, teacher, name, steps=steps, ema=0.9)
            assert train(FewStepsRecipe(settings), settings) == 0
    assert_same(*(checkpoint.step_folder(teacher.parent / name, 4) for name in ("whole", "broken")))


def test_the_guidance_of_each_block_is_that_of_sampling(home: Path, teacher: Path) -> None:  # noqa: F811
    for schedule, expected in (("", [1.0, 1.5, 2.0, 2.5]), ("constant", [3.0] * 4)):  # four blocks of four tokens
        objective = FewStepsRecipe(few(home, teacher, "g", FewSteps(cfg_schedule=schedule))).module
        assert objective.guidance_M.tolist() == expected


def test_guidance_as_an_input_rises_over_the_blocks(home: Path, teacher: Path) -> None:  # noqa: F811
    settings = few(home, teacher, "range", FewSteps(steps=3, guidance=(1.5, 4.0)), steps=2, lr=1e-2)
    train(FewStepsRecipe(settings), settings)
    pipe = load_pipeline(checkpoint.model_folder(teacher.parent / "range"), "cpu")
    weight = pipe.model.network.head.net.guidance_embed.weight
    assert weight.any() and pipe.model.network.config.guidance_max == 4.0
    own = {"guidance_scale": 3.0, "guidance_range": [1.5, 4.0], "cfg_schedule": "linear"}
    assert pipe.model.defaults == own | {"num_inference_steps": 2, "sampler": "direct"}
    torch.nn.init.normal_(weight)
    given: list[float] = []
    pipe.model.network.head.net.guidance_embed.register_forward_pre_hook(lambda _, scales: given.extend(scales[0].tolist()))

    def made(**more: Any) -> torch.Tensor:
        given.clear()
        return pipe("bee", seed=1, output_type="tokens", **more).bits

    three = made()
    assert given == [1.0, 1.5, 2.0, 2.5]  # four blocks
    assert torch.equal(made(preset="quick"), three) and torch.equal(made(guidance_scale=3.0), three)
    assert not torch.equal(made(guidance_scale=1.5), three)
    made(guidance_scale=4.0, cfg_schedule="constant")
    assert given == [4.0] * 4
    with pytest.raises(ValueError, match="guidance = 1; this model was taught guidance from 1.5 to 4"):
        made(guidance_scale=1.0)


def test_the_command_reads_the_recipe(home: Path, teacher: Path, capsys: Any) -> None:  # noqa: F811
    path = teacher.parent / "few.toml"
    model = ", ".join(f"{name} = {value}" for name, value in few(home, teacher, "x").class_patch.model.items())
    path.write_text(
        f'recipe = "few_steps_class"\n[run]\nout = "{teacher.parent / "made"}"\nsteps = 1\nbatch_size = 4\n'
        f'[data]\ntrain = ["{home / "bits"}"]\n[class_patch]\ntokenizer = "{home / "tokenizer"}"\nsize = 16\nclass_count = 3\n'
        f'init = "{teacher}"\nmodel = {{ {model} }}\n[few_steps]\nsteps = 2\n'
    )
    assert main([str(path), "--dry-run"]) == 0 and "few_steps_class" in capsys.readouterr().out
    assert main([str(path)]) == 0 and checkpoint.model_folder(teacher.parent / "made").is_dir()
    assert main([str(path), "--write-samples", str(teacher.parent / "s")]) == 2
    assert main([str(path), "--set", "class_patch.init=''"]) == 2
    assert "name the teacher" in capsys.readouterr().err
