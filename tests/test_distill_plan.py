"""The plan of a distillation: the student's own, and beside it what the teacher computes and keeps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import SHAPE, SMALL
from tiny_model import BITS, QWEN3, tiny_model, tiny_text_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitdance.folder.checkpoint import load_model, save_model
from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.noise import ImageNoise
from distill.cli import main
from distill.config import DistillConfig, load_config
from distill.growth import grow
from distill.plan import companion, shapes
from distill.teacher import Teacher
from distill.view import teacher_view
from lfq_tokenizer import TokenizerConfig
from stages.config import load_config as load_stage
from stages.plan import memory
from stages.plan.companion import Companion
from stages.plan.flops import Document, document_flops
from stages.plan.plan import Machine, make_plan
from stages.plan.shape import Shape, count
from stages.recipes.generator.documents import Example

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PUBLISHED, DEMO = ROOT / "configs/14b/distill.toml", ROOT / "configs/demo/distill.toml"
NO_DATA = ["data.train=['nowhere/*.tar']"]
TEACHER = replace(SHAPE, head=replace(SHAPE.head, parallel_num=4))
MIB = 2**20

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Plan:
    def run(config: Path, *changes: str, processes: str = "1") -> dict[str, Any]:
        arguments = [part for change in changes for part in ("--set", change)]
        assert main([str(config), *arguments, "--dry-run", "--json", "--processes", processes]) == 0
        plan: dict[str, Any] = json.loads(capsys.readouterr().out)
        return plan

    return run


def beside(**changes: Any) -> Companion:
    return Companion(**{"name": "other", "shape": TEACHER, "passes": 1, "steps": 1000, "dtype": torch.bfloat16, **changes})


def demo(*changes: str) -> DistillConfig:
    return load_config(DEMO, [*NO_DATA, *changes])


def test_a_companion_adds_itself_and_changes_nothing_else() -> None:
    alone = make_plan(SMALL, Machine((1,)), 10, SHAPE)
    other = beside(steps=250)
    both = make_plan(SMALL, Machine((1,)), 10, SHAPE, other)
    flops = both.flops.pop("other")
    assert both.flops == alone.flops and flops > 0
    assert alone.flops_of_run == SMALL.run.steps * alone.flops_per_step
    # it runs for a quarter of the steps
    assert both.flops_of_run == pytest.approx(1000 * alone.flops_per_step + 250 * flops)
    assert both.columns[0].hours / alone.columns[0].hours == pytest.approx(both.flops_of_run / alone.flops_of_run)
    before, after = alone.columns[0], both.columns[0]
    added = {"other (frozen)": other.gpu, "a pass of the other": after.memory["a pass of the other"]}
    assert after.memory == before.memory | added
    assert after.validation - before.validation == other.gpu > 0
    # its pass adds to what is kept, and counts where that is more than the backward pass
    kept, on_top = before.memory["activations kept"], before.memory["on top at the peak"]
    peak = max(kept + on_top, kept + added["a pass of the other"])
    assert after.training - before.training == pytest.approx(other.gpu + peak - kept - on_top)


@pytest.mark.parametrize("guided", [False, True])
def test_flops_of_the_teacher_are_those_that_torch_counts(guided: bool) -> None:
    text, h, w, S = 9, 8, 4, 2
    student, model = tiny_model(P=16, diff_batch_mul=S), tiny_model(P=4)
    document: list[TextPiece | ImagePiece] = [TextPiece([5] * text, predict=True), ImagePiece(torch.ones(BITS, h, w))]
    batch = build_batch([document], 4, student.special)
    batch.noise = ImageNoise.draw(h * w, student.head.config, 0.1, torch.Generator().manual_seed(0))
    texts = [None, [6] * text] if guided else [None]
    views = [teacher_view([Example("a", document, None)], batch, 4, student.special, {}, ids) for ids in texts]
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # attention as matrix products: torch does not count the fused kernel of a CPU
        Teacher(model, guidance=2.0).predict(views, batch, "dense")

    head = replace(model.head.config, diff_batch_mul=S)
    shape = Shape(QWEN3, len(tiny_text_tokenizer()), 12, head, TokenizerConfig(32, (1, 1), 1, BITS))
    one = Document(text, h, w, 4)
    # asked for a document in the student's blocks
    found = beside(shape=shape, passes=len(views)).flops([replace(one, P=16)])[0]
    # torch counts every pair of positions, and not the pairs that the mask leaves
    attention = document_flops(model.requires_grad_(False), one).attention
    masked = len(views) * attention * (one.length**2 / one.pairs - 1)
    assert found + masked == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_guidance_asks_the_teacher_twice_and_cached_predictions_not_at_all() -> None:
    def flops(*changes: str) -> float:
        config = demo("distill.objectives={teacher = 1.0, data = 0.0}", *changes)
        teacher = companion(config, shapes(config)[1])
        return teacher.flops([Document(20, 8, 8, 64)])[0] if teacher else 0.0

    assert flops("distill.guidance=2.0") == 2 * flops() > 0
    assert flops("distill.cached=true") == 0
    config = demo("distill.objectives={teacher = 0.0, data = 1.0}")
    assert companion(config, shapes(config)[1]) is None


def test_the_teacher_stops_when_its_term_has_faded(planned: Plan) -> None:
    for fade, steps in ((300, 300), (0, 1200), (5000, 1200)):
        plan = planned(DEMO, *NO_DATA, f"distill.fade_steps={fade}")
        own = plan["flops_per_step"] - plan["flops"]["teacher"]
        assert plan["companion"]["steps"] == steps
        assert plan["flops_of_run"] == pytest.approx(1200 * own + steps * plan["flops"]["teacher"])


def test_a_teacher_takes_the_bytes_of_its_weights_where_it_is_put(planned: Plan) -> None:
    def taken(*changes: str) -> tuple[float, float]:
        column = planned(DEMO, *NO_DATA, *changes)["columns"][0]
        return column["memory"]["teacher (frozen)"], column["host"]

    held = {
        dtype: float(sum(p.nbytes for p in Teacher.load(demo(f"distill.dtype={dtype}").distill).model.parameters()))
        for dtype in ("float32", "bfloat16")
    }
    assert taken("distill.dtype=float32") == (held["float32"], 0.0)
    assert taken("distill.dtype=bfloat16") == (held["bfloat16"], 0.0)
    assert taken("distill.device=cpu") == (0.0, held["bfloat16"])
    visiting, host = taken("distill.offload=true")
    layers = load_model("demo", "cpu", torch.bfloat16).backbone.lm.base_model
    one = sum(p.nbytes for part in (layers.embed_tokens, layers.layers[0]) for p in part.parameters())
    assert host == held["bfloat16"] and visiting == pytest.approx(one, rel=0.01)


def test_a_pass_takes_what_a_forward_pass_makes() -> None:
    """Against the storages that a real one makes, with as many layers as the model has."""
    model = TEACHER.model(SMALL.generator, torch.float32).requires_grad_(False)
    document: list[TextPiece | ImagePiece] = [TextPiece([0] * 18, predict=True), ImagePiece(torch.ones(8, 16, 16))]
    batch = build_batch([document], 2, model.special)
    with torch.no_grad(), memory.Live([*model.parameters(), *model.buffers()]) as live:
        bare = replace(batch, label_ids_T=batch.label_ids_T[:0])
        bare.noise = ImageNoise.draw(256, TEACHER.head, 0.0, torch.Generator().manual_seed(0))
        before = live.now
        model(bare)
    assert beside(dtype=torch.float32).peak(batch, dense=True) == pytest.approx(live.most - before, rel=0.15)
    assert beside(dtype=torch.bfloat16).peak(batch, dense=True) < 0.8 * live.most
    assert beside(place="host").peak(batch, dense=True) == 0


def test_the_published_recipe_is_planned_without_any_folder(planned: Plan) -> None:
    plan = planned(PUBLISHED, processes="64,8,512")
    config = load_config(PUBLISHED)
    assert config.run.steps * plan["samples"] == 30_720_000 and config.optimizer.lr == 1e-5
    assert [c["samples"] for c in plan["columns"]] == [1536] * 3
    assert [c["fits"] for c in plan["columns"]] == [True, False, True]
    (picture,) = plan["pictures"]
    assert (picture["resolution"], picture["blocks"]) == (1024, 64)
    assert plan["companion"]["block_size"] == 16 and 15.5e9 < plan["companion"]["parameters"] < 17e9
    (assumed,) = [text for text in plan["assumed"] if "distill.teacher" in text]
    assert "'runs/14b/finetune'" in assumed and "16 tokens per step" in assumed and assumed.endswith("is not here")
    # the header says what the plan says
    header = " ".join(PUBLISHED.read_text().split("extends")[0].split())
    hours = {c["processes"]: f"{c['hours']:,.0f}" for c in plan["columns"]}
    gib = [f"{plan['columns'][0][part] / 2**30:.0f}" for part in ("training", "validation")]
    assert f"{hours[64]} on 64 H100 at an MFU of 40 % (512: {hours[512]}; 8: {hours[8]})" in header
    assert f"a GPU of 64: {gib[0]} GiB in training; {gib[1]} GiB to judge and save" in header


def test_it_goes_on_from_the_stage_before() -> None:
    config = load_config(PUBLISHED)
    before = load_stage(ROOT / "configs/14b/finetune.toml")
    assert config.distill.teacher == before.run.out and config.generator.backbone == before.generator.backbone
    assert config.generator.head == {**before.generator.head, "parallel_num": 64}


def test_a_teacher_that_is_here_gives_the_shape() -> None:
    student, teacher = shapes(demo())
    assert student.absent == () and teacher.head.parallel_num == 16
    grown = grow(load_model("demo", "cpu", torch.float32), 8)
    assert student.vocabulary == grown.backbone.vocabulary_size and student.sides == len(grown.special.res_ids)
    assert student.head.to_dict() == grown.head.config.to_dict()
    parts = count(student.model(demo().generator, torch.float32))
    assert sum(part.all for part in parts.values()) == sum(p.numel() for p in grown.parameters())


def test_a_student_that_goes_on_has_its_own_shape(tmp_path: Path) -> None:
    grown = grow(load_model("demo", "cpu", torch.float32), 8)
    grown.backbone.grow_vocabulary(1500)
    grown.head.config = replace(grown.head.config, diff_batch_mul=2)
    save_model(grown, tmp_path / "grown")
    goes_on = f"generator.init={tmp_path / 'grown'}"
    student, teacher = shapes(demo(goes_on))
    assert (student.vocabulary, student.head.parallel_num, student.absent) == (1500, 64, ())
    assert (teacher.vocabulary, teacher.head.parallel_num) == (1055, 16)
    # noise draws are the student's, whoever says how many
    assert shapes(demo(goes_on, "generator.head.diff_batch_mul=7"))[1].head.diff_batch_mul == 7
    silent = demo(goes_on)
    silent = replace(silent, generator=replace(silent.generator, head={"parallel_num": 64}))
    assert [shape.head.diff_batch_mul for shape in shapes(silent)] == [2, 2]
    student, teacher = shapes(demo(goes_on, "distill.teacher=nowhere"))
    assert student.vocabulary == 1500 and teacher.head.parallel_num == 16 and "'nowhere'" in student.absent[0]
    student, teacher = shapes(demo("generator.init=nowhere"))
    assert student.vocabulary == 1103 and student.absent == ("generator.init = 'nowhere'",)


def test_the_teachers_own_pictures_count_among_the_data(planned: Plan) -> None:
    mixed = ["distill.objectives={data = 1.0, samples = 3.0}", "distill.samples=['made/*.tar']"]
    plan = planned(DEMO, *NO_DATA, *mixed)
    sources = plan["config"]["data"]["sources"]
    assert [(s["places"], s["weight"]) for s in sources] == [(["nowhere/*.tar"], 1.0), (["made/*.tar"], 3.0)]
    assert "nowhere" in plan["data"]["absent"] and any("the data are not here" in text for text in plan["assumed"])
    alone = planned(DEMO, *NO_DATA, "distill.objectives={data = 0.0, samples = 1.0}", mixed[1])
    assert [s["places"] for s in alone["config"]["data"]["sources"]] == [["made/*.tar"]]
    assert "made" in alone["data"]["absent"]


def test_what_does_not_fit_is_said_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", NO_DATA[0], "--set", "distill.dtype=float32", "--set", "run.batch_size=1"]
    assert main([str(DEMO), *settings, "--dry-run", "--gpu-memory", "0.22"]) == 0
    out = capsys.readouterr().out
    assert "teacher: frozen, 16 tokens a block, one forward pass in each of the first 1,200 steps" in out
    assert "does not fit; try" in out and "distill.offload = true (saves " in out


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DEMO, "generator.head.parallel_num=36", "a patch side of 6 (36 tokens per step) is no multiple of the teacher's 4"),
        (PUBLISHED, "generator.head.parallel_num=36", "distill.teacher = 'runs/14b/finetune' is not here and taken to be of 16"),
        (DEMO, "generator.head.parallel_num=50", "parallel_num = 50"),
        (DEMO, "generator.head.ch_latent=512", "distill.teacher = 'demo' has a head with ch_latent = 256"),
        (DEMO, "generator.backbone.hidden_size=128", "distill.teacher = 'demo' has a backbone with hidden_size = 256"),
        (DEMO, "distill.device=gpu", "distill.device = 'gpu'"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_and_exit_code_2(
    config: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), "--set", change, "--dry-run"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
