"""`bitdance distill` on tiny drawings: every objective, stop and go on, export, pictures; and what does not fit is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_debug_run import draw, rows
from test_debug_run import train as train_stage

import stages.cli
from bitdance import BitDancePipeline
from bitdance.cli import main as bitdance
from distill.cli import main as distill
from distill.config import load_config
from distill.recipe import build_recipe
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors
from stages.data.cli import main as data
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import complete, newest, verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "debug" / "distill.toml"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GUIDED = ("distill.objectives={data=0.0, teacher=1.0}", "distill.guidance=2.0")
FOLDED = ("distill.objectives={data=0.0, teacher=1.0, samples=1.0}", "distill.guidance=2.0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings, their bits, a teacher of 4 tokens per step, its pictures and its predictions."""
    place = teacher_in(tmp_path_factory.mktemp("distill"))
    assert distill([*arguments(place), *settings(*GUIDED), *samples(place)]) == 0
    assert distill([*arguments(place), "--write-targets", str(place / "targets"), "--count", "18", "--per-folder", "10"]) == 0
    return place


def teacher_in(place: Path) -> Path:
    """The same folder with drawings, their bits, and a teacher of 4 tokens per step."""
    draw(place / "drawings")
    assert data(["pack", "folder", str(place / "shards"), str(place / "drawings"), "--size", "16"]) == 0
    assert train_stage("tokenizer", place / "tokenizer", place / "shards", "run.steps=2") == 0
    assert stages.cli.tokenizer(["encode", str(place / "shards"), str(place / "bits"), "--model", str(place / "tokenizer")]) == 0
    changes = (f"generator.tokenizer={place / 'tokenizer'}", "generator.stage=pretrain", "run.steps=2")
    assert train_stage("generator", place / "teacher", place / "bits", *changes) == 0
    return place


def samples(place: Path) -> list[str]:
    return ["--write-samples", str(place / "samples"), "--count", "14", "--per-folder", "8", "--batch-size", "3"]


def settings(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def arguments(place: Path, shards: str = "bits") -> list[str]:
    return [
        str(CONFIG),
        *settings(
            f"data.train={json.dumps([str(place / shards)])}",
            f"distill.teacher={place / 'teacher'}",
            f"generator.tokenizer={place / 'tokenizer'}",
        ),
    ]


def run(place: Path, out: Path, *changes: str, shards: str = "bits") -> int:
    return distill([*arguments(place, shards), *settings(f"run.out={out}", *changes)])


def same(one: Path, other: Path) -> None:
    """Weights, averages, moments of two checkpoints."""
    for path in sorted(path.relative_to(one) for path in one.rglob("*.safetensors")):
        first, second = (read_safetensors(folder / path) for folder in (one, other))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), path


ALL_OBJECTIVES = {
    "data": ("distill.objectives={data=1.0, teacher=0.0}",),
    "teacher": ("distill.objectives={data=0.0, teacher=1.0}", "distill.fade_steps=0"),
    "data+teacher": (),
    "folded": FOLDED,
    "cached": ("distill.cached=true",),
    "everything partitioned": ("deepspeed.zero_stage=3", "run.precision=bfloat16-weights", "distill.dtype=bfloat16"),
}


def changes_of(place: Path, name: str) -> tuple[tuple[str, ...], str]:
    """What to set, and the shards to train on."""
    more = (f"distill.samples={json.dumps([str(place / 'samples')])}",) if name == "folded" else ()
    return (*ALL_OBJECTIVES[name], *more), "targets" if name == "cached" else "bits"


@pytest.mark.parametrize("name", ALL_OBJECTIVES)
def test_every_objective_trains_stops_and_goes_on_exactly(place: Path, tmp_path: Path, name: str) -> None:
    """4 steps equal 2 and 2 more; in the second half with loader processes; two micro-steps each."""
    changes, shards = changes_of(place, name)
    changes = (*changes, "run.accumulation=2", "run.sample_every=100")
    assert run(place, tmp_path / "whole", *changes, shards=shards) == 0
    assert run(place, tmp_path / "parts", *changes, "run.steps=2", shards=shards) == 0
    assert run(place, tmp_path / "parts", *changes, "run.workers=2", shards=shards) == 0
    same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    whole = [row for row in rows(tmp_path / "whole") if "loss" in row]
    parts = [row for row in rows(tmp_path / "parts") if "loss" in row]
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts] and len(whole) == 4
    assert ("pull" in whole[0]) == (name != "data")
    assert all(row["vision"] > 0 for row in whole)


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A student of data and teacher, and one with guidance folded in; exported."""
    for name in ("data+teacher", "folded"):
        changes, shards = changes_of(place, name)
        assert run(place, place / f"run-{name}", *changes, shards=shards) == 0
        assert stages.cli.export([str(place / f"run-{name}"), str(place / name)]) == 0
    return place


def test_a_student_is_exported_loaded_and_draws_the_same_bits(trained: Path, tmp_path: Path) -> None:
    def bits(folder: Path) -> torch.Tensor:
        pipe = BitDancePipeline.from_pretrained(folder, device="cpu", dtype="float32")
        return pipe(["a red circle", "the line, blue"], num_inference_steps=3, seed=5, output_type="bits").bits

    checkpoint = newest(trained / "run-data+teacher") / "model"
    assert torch.equal(bits(checkpoint), bits(trained / "data+teacher"))
    assert verify(checkpoint.parent) == 4
    out = tmp_path / "out"
    model = str(trained / "data+teacher")
    assert bitdance(["generate", "a red circle", "--model", model, "--steps", "2", "--device", "cpu", "-o", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 1


def test_a_student_may_name_sides_that_its_teacher_has_no_token_for(place: Path, tmp_path: Path) -> None:
    assert run(place, tmp_path / "run", "generator.resolution_tokens=20", "run.steps=1") == 0
    pipe = BitDancePipeline.from_pretrained(newest(tmp_path / "run") / "model", device="cpu", dtype="float32")
    assert len(pipe.model.special.res_ids) == 20 and len(pipe.model.special.query_ids) == 15


def test_a_student_takes_a_quarter_of_the_steps_and_remembers_its_teacher(trained: Path) -> None:
    blocks: dict[str, int] = {}
    for name in ("teacher", "data+teacher"):
        folder = newest(trained / "teacher") / "model" if name == "teacher" else trained / name
        pipe = BitDancePipeline.from_pretrained(folder, device="cpu", dtype="float32")
        seen: list[int] = []
        count = lambda pipe, block, t, more, seen=seen: seen.append(block)  # noqa: E731
        pipe("a red circle", num_inference_steps=1, seed=0, callback_on_step_end=count)
        blocks[name] = len(seen)
    assert blocks == {"teacher": 16, "data+teacher": 4}
    card = read_json(trained / "data+teacher" / "bitdance.json")["card"]
    assert len(card["teacher"]["fingerprint"]) == 16 and card["recipe"] == "distill"
    assert [stage["name"] for stage in card["stages"]] == ["pretrain", "distill"]
    assert card["distill"]["objectives"] == {"data": 1.0, "teacher": 1.0, "samples": 0.0}
    assert str(trained) not in json.dumps(card)


def test_a_student_with_guidance_folded_in_calls_for_no_second_branch(trained: Path) -> None:
    pipe = BitDancePipeline.from_pretrained(trained / "folded", device="cpu", dtype="float32")
    assert pipe.model.extras["defaults"]["guidance_scale"] == 1.0
    rows_seen: list[int] = []
    hook = pipe.model.backbone.lm.base_model.register_forward_pre_hook(
        lambda module, inputs, kwargs: rows_seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    pipe("a red circle", num_inference_steps=1, seed=0)
    hook.remove()
    assert set(rows_seen) == {1}
    assert read_json(trained / "data+teacher" / "bitdance.json")["defaults"]["guidance_scale"] == 2.0


def test_a_student_goes_on_as_a_stage_and_as_a_student(trained: Path, tmp_path: Path) -> None:
    """`bitdance train` takes it as `generator.init`, and so does a second round of distillation; its card keeps the teacher."""
    changes = (f"generator.init={trained / 'data+teacher'}", "generator.head.parallel_num=16", "run.steps=1")
    changes += ("generator.stage=more", f"generator.tokenizer={trained / 'tokenizer'}")
    assert train_stage("generator", tmp_path / "stage", trained / "bits", *changes) == 0
    card = read_json(newest(tmp_path / "stage") / "model" / "bitdance.json")["card"]
    assert card["teacher"]["fingerprint"] and [stage["name"] for stage in card["stages"]] == ["pretrain", "distill", "more"]
    assert run(trained, tmp_path / "again", f"generator.init={trained / 'data+teacher'}", "run.steps=1", "optimizer.lr=0.0") == 0
    same(trained / "data+teacher", newest(tmp_path / "again") / "model")


def test_the_teachers_pictures_hold_its_guided_bits_and_where_they_come_from(place: Path) -> None:
    folders = sorted((place / "samples").iterdir())
    assert [folder.name for folder in folders] == ["00000", "00001"]
    made = ShardDataset(ShardIndex.open([str(folder) for folder in folders]))
    assert len(made) == 14
    pipe = BitDancePipeline.from_pretrained(newest(place / "teacher") / "model", device="cpu", dtype="float32")
    from stages.feed import sample_generator

    for number in (0, 7, 13):
        sample = made[number]
        generator = sample_generator(0, number)
        torch.rand((), generator=generator)  # the choice of the caption
        steps = pipe.model.extras["defaults"]["num_inference_steps"]
        alone = pipe(sample.captions[0], num_inference_steps=steps, guidance_scale=2.0, generator=generator, output_type="bits")
        assert sample.bits_Chw is not None and torch.equal(alone.bits[0].to(torch.int8), sample.bits_Chw)
    source = read_json(folders[0] / "pack.json")["source"]
    assert (source["name"], source["guidance"]) == ("samples", 2.0) and len(source["teacher"]) == 16
    assert str(place) not in json.dumps(source)


def test_writing_goes_on_where_it_stopped_and_machines_share_it(place: Path, tmp_path: Path) -> None:
    changes = settings(*GUIDED)
    for shard in ("0/2", "1/2"):
        command = [*arguments(place), *changes, *samples(place), "--shard", shard]
        command[command.index("--write-samples") + 1] = str(tmp_path / "shared")
        assert distill(command) == 0
    for folder in ("00000", "00001"):
        one, other = (read_json(where / folder / "pack.json") for where in (place / "samples", tmp_path / "shared"))
        assert one["source"] == other["source"] and one["samples"] == other["samples"]
    shutil.rmtree(tmp_path / "shared" / "00001")
    before = (tmp_path / "shared" / "00000" / "pack.json").stat().st_mtime_ns
    assert distill([part if part != "0/2" else "0/1" for part in [*command[:-1], "0/1"]]) == 0
    assert (tmp_path / "shared" / "00000" / "pack.json").stat().st_mtime_ns == before
    assert (tmp_path / "shared" / "00001" / "pack.json").is_file()


def test_targets_of_pixels_and_of_bits_are_alike(place: Path, tmp_path: Path) -> None:
    for shards in ("shards", "bits"):
        command = [*arguments(place, shards), "--write-targets", str(tmp_path / shards), "--count", "18", "--per-folder", "10"]
        assert distill([*command, *settings("data.mix={16 = 1}")]) == 0
    one, other = (ShardDataset(ShardIndex.open([str(tmp_path / name)])) for name in ("shards", "bits"))
    assert len(one) == 18
    for number in range(18):
        first, second = one[number], other[number]
        assert first.captions == second.captions and first.bits_Chw is not None and second.bits_Chw is not None
        assert torch.equal(first.bits_Chw, second.bits_Chw)
        assert first.targets is not None and first.targets == second.targets


def test_several_sources_stand_in_the_row_as_often_as_they_weigh(place: Path) -> None:
    changes = settings(
        "distill.objectives={data=1.0, teacher=0.0, samples=3.0}", f"distill.samples={json.dumps([str(place / 'samples')])}"
    )
    parts = [part for part in [*arguments(place)[1:], *changes] if part != "--set"]
    recipe = build_recipe(load_config(CONFIG, parts))
    sources = [recipe.mixture.at(index).source for index in range(400)]
    assert sources.count(0) == 100 and sources.count(1) == 300


def test_two_processes_learn_what_one_learns_with_twice_the_batch(place: Path, tmp_path: Path) -> None:
    changes = ("run.steps=2", "run.sample_every=100", "run.precision=float32", "deepspeed.zero_stage=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distill"]
    command += [*arguments(place), *settings(f"run.out={tmp_path / 'two'}", *changes, "run.batch_size=3")]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(place, tmp_path / "one", *changes, "run.batch_size=6") == 0
    for name in ("loss", "vision", "pull", "teacher"):
        two, one = ([row[name] for row in rows(tmp_path / n) if "loss" in row] for n in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-4 if name != "loss" else 1e-5), name


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generator.head.parallel_num=9", r"no multiple of the teacher's 2"),
        ("generator.head.parallel_num=4", r"no multiple of the teacher's 2"),
        ("generator.head.parallel_num=17", r"parallel_num = 17; a patch is square"),
        ("generator.head.ch_latent=256", r"distill.teacher = .* has a head with ch_latent = 128"),
        ("generator.backbone.hidden_size=32", r"distill.teacher = .* has a backbone with hidden_size = 64"),
        ("generator.tokenizer=demo", r"distill.teacher = .* bits"),
        ("distill.teacher=nowhere", "nowhere"),
        ("distill.device=cuda:77", "distill.device = 'cuda:77'"),
        ("distill.techer=x", "did you mean distill.teacher"),
        ("distill.cached=true", "has no targets"),
        ("recipe=generator", "bitdance train"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    import re

    said = refused(capsys, run(place, tmp_path / "run", change))
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists() or not complete(tmp_path / "run")


def other_teacher(trained: Path, folder: Path, what: str) -> Path:
    """A model like the teacher but for one thing."""
    shutil.copytree(newest(trained / "teacher") / "model", folder)
    if what == "picture tokenizer":
        weights = read_safetensors(folder / "ae.safetensors")
        weights["encoder.conv_in.weight"] += 1
        from lfq_tokenizer.weights import write_safetensors

        write_safetensors(weights, folder / "ae.safetensors")
    elif what == "backbone":
        config = read_json(folder / "config.json")
        write_json({**config, "num_hidden_layers": 1, "layer_types": ["full_attention"]}, folder / "config.json")
    else:
        tokenizer = read_json(folder / "tokenizer.json")
        swapped = tokenizer["model"]["vocab"]
        swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
        write_json(tokenizer, folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("what", ["picture tokenizer", "backbone", "text tokenizer"])
def test_a_teacher_that_the_student_did_not_grow_out_of_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    teacher = other_teacher(trained, tmp_path / "other", what)
    changes = (f"generator.init={trained / 'data+teacher'}", f"distill.teacher={teacher}")
    said = refused(capsys, run(trained, tmp_path / "run", *changes))
    assert f"another {what}" in said and "generator.init" in said


def test_train_names_the_command_that_distils(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"bitdance distill {CONFIG}" in refused(capsys, stages.cli.train([str(CONFIG)]))
