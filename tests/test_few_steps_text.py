"""Few evaluations for a model of prompts: only the head learns, the guidance that is folded in, exact resuming, pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_distill_run import same, settings, teacher_in

from bitdance import BitDancePipeline
from bitdance.cli import main as bitdance
from distill.cli import main as distill
from distill.few_steps_config import load_config
from distill.few_steps_text import FewStepsTextObjective, build_recipe
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors, write_safetensors
from stages.engine.checkpoint import newest
from stages.engine.loader import step_generator

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent.parent / "configs" / "debug" / "few_steps.toml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings, their bits, and a teacher."""
    return teacher_in(tmp_path_factory.mktemp("few"))


def read_png(path: Path) -> bytes:
    with Image.open(path) as picture:
        assert json.loads(picture.info["bitdance"])["sampler"] == "direct"
        return picture.tobytes()


def changes(place: Path, *more: str, shards: str = "bits") -> list[str]:
    given = f"data.train={json.dumps([str(place / shards)])}", f"data.heldout={json.dumps([str(place / shards)])}"
    return [*given, f"generator.init={place / 'teacher'}", f"generator.tokenizer={place / 'tokenizer'}", *more]


def test_only_the_head_learns_and_goes_on_exactly(place: Path, tmp_path: Path) -> None:
    said = changes(place, "optimizer.lr=1e-2", "run.sample_every=100")
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert distill([str(CONFIG), *settings(*said, f"run.out={tmp_path / out}", f"run.steps={steps}")]) == 0
    same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("heldout/end" in row for row in rows) and all(row["end"] > 0 for row in rows if "loss" in row)
    student, teacher = (
        BitDancePipeline.from_pretrained(newest(run) / "model", device="cpu", dtype="float32")
        for run in (tmp_path / "whole", place / "teacher")
    )
    known = teacher.model.state_dict()
    for name, tensor in student.model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, known[name]), name
    assert not torch.equal(student.model.head.net.final_layer.linear.weight, teacher.model.head.net.final_layer.linear.weight)
    own = student.model.extras["defaults"]
    assert (own["preset"], own["num_inference_steps"], own["guidance_scale"]) == ("quick", 2, 1.0)
    assert student.model.extras["card"]["few_steps"]["guidance"] == 2.0
    two = student("a red circle", seed=1, output_type="bits").bits
    assert torch.equal(student("a red circle", seed=1, output_type="bits", preset="quick").bits, two)
    assert student("a red circle", seed=1, output_type="bits", preset="instant").bits.shape == two.shape
    out = tmp_path / "pictures"
    asked = ["generate", "--model", str(newest(tmp_path / "whole") / "model"), "--device", "cpu", "--dtype", "float32"]
    assert bitdance([*asked, "a red circle", "--preset", "instant", "--seed", "4", "-o", str(out / "one")]) == 0
    (one,) = (out / "one").glob("*.png")
    assert bitdance([*asked, "--from", str(one), "-o", str(out / "again")]) == 0
    (again,) = (out / "again").glob("*.png")
    assert read_png(one) == read_png(again)
    with pytest.raises(ValueError, match="it takes 'direct' alone"):
        student("a red circle", preset="fast")
    with pytest.raises(ValueError, match="was not: take"):
        teacher("a red circle", preset="instant")


def test_an_adapter_makes_a_student_of_the_teacher(place: Path, tmp_path: Path, capsys: Any) -> None:
    """Trained, stopped and resumed, loaded, merged, taken out again; the file is small and says how it samples."""
    pytest.importorskip("peft", reason="peft is not installed (extra train)")
    lora = "generator.lora.rank=2", "generator.lora.dropout=0.1", "few_steps.evaluations=1"
    said = changes(place, "optimizer.lr=1e-2", "run.sample_every=100", *lora)
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert distill([str(CONFIG), *settings(*said, f"run.out={tmp_path / out}", f"run.steps={steps}")]) == 0
    whole, teacher = newest(tmp_path / "whole"), newest(place / "teacher") / "model"
    same(whole, newest(tmp_path / "parts"))
    assert sorted(path.name for path in whole.iterdir()) == ["adapter", "manifest.json", "resume"]
    weights = read_safetensors(whole / "adapter" / "adapter_model.safetensors")
    assert all(".head.net." in name and "time_embed" not in name and tensor.any() for name, tensor in weights.items())
    assert {name.split("head.net.")[1].split(".")[0] for name in weights} == {
        "cond_embed", "input_proj", "ada_ln_blocks", "res_blocks", "final_layer",
    }  # fmt: skip
    own = {"guidance_scale": 1.0, "preset": "quick", "sampler": "direct", "num_inference_steps": 1}
    assert read_json(whole / "adapter" / "bitdance.json")["defaults"] == own

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert bitdance(["export", str(tmp_path / "whole"), str(adapter), "--adapter"]) == 0
    assert bitdance(["export", str(tmp_path / "whole"), str(merged)]) == 0
    pipe = BitDancePipeline.from_pretrained(teacher, device="cpu", dtype="float32")
    before = pipe("a red circle", seed=1, output_type="bits").bits
    pipe.load_lora_weights(adapter)
    loaded = pipe("a red circle", seed=1, output_type="bits").bits
    student = BitDancePipeline.from_pretrained(merged, device="cpu", dtype="float32")
    assert torch.equal(student("a red circle", seed=1, output_type="bits").bits, loaded) and not torch.equal(loaded, before)
    assert student.model.extras["defaults"].items() >= own.items()
    assert torch.equal(pipe("a red circle", seed=1, output_type="bits", preset="instant").bits, loaded)
    with pytest.raises(ValueError, match="it takes 'direct' alone"):
        pipe("a red circle", preset="fast")
    pipe.unload_lora_weights()
    assert torch.equal(pipe("a red circle", seed=1, output_type="bits").bits, before)
    with pytest.raises(ValueError, match="was not: take"):
        pipe("a red circle", preset="instant")
    with pytest.raises(ValueError, match="lora_scale = 0.5 with the adapter .*use it whole"):
        pipe.load_lora_weights(adapter, scale=0.5)

    asked = ["generate", "a red circle", "--device", "cpu", "--dtype", "float32", "--model"]
    for out, model in (("one", [str(teacher), "--lora", str(adapter)]), ("other", [str(merged)])):
        assert bitdance([*asked, *model, "-o", str(tmp_path / out)]) == 0
    (one,), (other,) = ((tmp_path / out).glob("0*.png") for out in ("one", "other"))
    assert read_png(one) == read_png(other)
    again = ["generate", "--from", str(one), "--device", "cpu", "--model", str(teacher), "-o", str(tmp_path / "again")]
    assert bitdance(again) == 2 and "made with the adapter" in capsys.readouterr().err
    assert bitdance([*again, "--lora", str(adapter)]) == 0
    assert next((tmp_path / "again").glob("0*.png")).read_bytes() == one.read_bytes()


def test_guidance_as_an_input_is_chosen_when_pictures_are_made(place: Path, tmp_path: Path, capsys: Any) -> None:
    said = changes(place, "optimizer.lr=1e-2", "run.sample_every=100", "few_steps.guidance=[1.0, 4.0]")
    for out, steps in (("whole", 3), ("parts", 1), ("parts", 3)):
        assert distill([str(CONFIG), *settings(*said, f"run.out={tmp_path / out}", f"run.steps={steps}")]) == 0
    same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    model = newest(tmp_path / "whole") / "model"
    weights = read_safetensors(model / "vision_head.safetensors")
    more = weights.keys() - read_safetensors(newest(place / "teacher") / "model" / "vision_head.safetensors").keys()
    assert more == {"net.guidance_embed.weight"} and weights["net.guidance_embed.weight"].any()
    assert read_json(model / "vision_head_config.json")["guidance_max"] == 4.0

    write_safetensors(weights | {"net.guidance_embed.weight": torch.randn(128, 16)}, model / "vision_head.safetensors")
    pipe = BitDancePipeline.from_pretrained(model, device="cpu", dtype="float32")
    own = pipe.model.extras["defaults"]
    assert own["guidance_range"] == [1.0, 4.0] and own["sampler"] == "direct" and 1 <= own["guidance_scale"] <= 4
    calls: list[int] = []
    pipe.model.head.net.register_forward_pre_hook(lambda net, given: calls.append(len(given[2])))

    def made(guidance: float | None, **more: Any) -> torch.Tensor:
        return pipe("a red circle", seed=1, output_type="bits", guidance_scale=guidance, **more).bits

    assert torch.equal(made(None), made(own["guidance_scale"])) and torch.equal(made(None), made(None, preset="quick"))
    assert not torch.equal(made(1.0), made(2.0)) and not torch.equal(made(2.0), made(4.0))
    assert set(calls) == {1}  # one branch, whatever the guidance
    with pytest.raises(ValueError, match="guidance = 4.5; this model was taught guidance from 1 to 4"):
        made(4.5)
    with pytest.raises(ValueError, match="guidance = 0.5; this model was taught"):
        made(0.5)

    asked = ["generate", "a red circle", "--model", str(model), "--device", "cpu", "--dtype", "float32", "--seed", "1"]
    assert bitdance([*asked, "--guidance", "9", "-o", str(tmp_path / "no")]) == 2
    assert "taught guidance from 1 to 4" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert bitdance([*asked, "--guidance", "3", "-o", str(tmp_path / "one")]) == 0
    (one,) = (tmp_path / "one").glob("0*.png")
    assert bitdance([*asked[:1], *asked[2:8], "--from", str(one), "-o", str(tmp_path / "two")]) == 0
    (two,) = (tmp_path / "two").glob("0*.png")
    assert read_png(one) == read_png(two)
    assert bitdance(["export", str(model), str(tmp_path / "d"), "--format", "diffusers"]) == 0
    moved = BitDancePipeline.from_pretrained(tmp_path / "d", device="cpu", dtype="float32")
    assert torch.equal(moved("a red circle", seed=1, output_type="bits", guidance_scale=3.0).bits, made(3.0))

    write_json(read_json(model / "bitdance.json") | {"defaults": {**own, "guidance_range": [1, 8]}}, model / "bitdance.json")
    with pytest.raises(ValueError, match="guidance_range up to 8, its head's config guidance_max = 4"):
        BitDancePipeline.from_pretrained(model, device="cpu")("a red circle")


def test_the_teacher_beside_an_adapter_is_the_model_as_it_was(place: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed (extra train)")
    made, plain = recipe(place, "generator.lora.rank=2"), recipe(place)
    teachers = [part.module.teacher.module for part in (made, plain)]
    assert same_tensors(teachers[0], teachers[1])
    with torch.no_grad():
        for name, weight in made.module.model.head.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    assert same_tensors(teachers[0], teachers[1])
    batch = plain.feed.batch(range(3), step_generator(0, 0, 0)).batch
    changed, before = (part.module.eval().rows(batch)[0] for part in (made, plain))
    assert changed.shape == before.shape and not torch.allclose(changed, before, atol=1e-3)
    assert {name for name, parameters in made.parts().items() if parameters} == {"head"}


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def recipe(place: Path, *more: str, shards: str = "bits") -> Any:
    return build_recipe(load_config(CONFIG, changes(place, "run.out=unused", *more, shards=shards)))


def test_what_is_taught_is_the_guided_prediction_of_the_same_pictures(place: Path) -> None:
    """The conditions without a prompt are those that the model gives the same pictures with the prompt dropped."""
    made = recipe(place)
    batch = made.feed.batch(range(6), step_generator(0, 0, 0)).batch
    (view,), model = batch.views, made.module.model
    P = batch.sequence.noise.noise_SMPC.shape[2]
    with torch.no_grad():
        found = view.as_student(model.conditions(view.seen(batch.sequence, flipped=True)), 1, P)
        dropped = made.config.generator.dropout
        alone = recipe(place, "generator.flip_max=0.1")
        assert dropped == 0.0 and found.shape == model.conditions(batch.sequence).shape
        assert not torch.allclose(found, model.conditions(batch.sequence), atol=1e-3)  # prompts matter
        # one picture by itself, without a prompt
        single = alone.feed.batch(range(1), step_generator(0, 0, 0)).batch
        own = single.views[0].as_student(model.conditions(single.views[0].seen(single.sequence, flipped=True)), 1, P)
    first = batch.sequence.generated_K[: len(own) * P].unflatten(0, (-1, P))[:, 0]
    assert torch.equal(batch.sequence.image_N[first], torch.zeros(len(own), dtype=batch.sequence.image_N.dtype))
    torch.testing.assert_close(found[: len(own)], own, rtol=1e-4, atol=1e-5)


def test_pictures_are_encoded_on_the_way(place: Path) -> None:
    losses = []
    for shards in ("bits", "shards"):
        made = recipe(place, shards=shards)
        assert isinstance(made.module, FewStepsTextObjective)
        loss, scalars, _ = made.module(made.feed.batch(range(4), step_generator(0, 0, 0)).batch, torch.Generator(), 0)
        assert 0 <= float(scalars["right_at_start"]) <= 1
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_does_not_fit_is_refused(place: Path, capsys: Any) -> None:
    for wrong, said in (
        (["generator.init=''"], "name the teacher"),
        (["few_steps.cfg_schedule=linear"], "one guidance for all blocks"),
        (["few_steps.steps=0"], "few_steps.steps"),
        (["few_steps.evaluations=0"], "evaluations"),
        (["few_steps.guidance=[1, 3]", "generator.lora.rank=2"], "an adapter does not hold the input for it"),
        (["few_steps.guidance=[3, 1]"], "two guidance scales"),
        (['generator.lora.targets=["backbone"]'], 'name layers of it, or leave targets out for ["head.net"]'),
    ):
        assert distill([str(CONFIG), *settings(*changes(place, *wrong))]) == 2
        assert said in capsys.readouterr().err
    assert distill([str(CONFIG), *settings(*changes(place, "data.mix={16=1}")), "--dry-run"]) == 0, capsys.readouterr().err
    trained = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:] if line.strip()}
    assert trained["backbone:"] == "frozen" != trained["head"], trained
    pytest.importorskip("peft", reason="peft is not installed (extra train)")
    adapter = changes(place, "data.mix={16=1}", "generator.lora.rank=2")
    assert distill([str(CONFIG), *settings(*adapter), "--dry-run", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parameters"]
    assert [name for name, part in parts.items() if part["trained"]] == ["head"]
    assert parts["head"]["trained"] < parts["head"]["all"] / 5
