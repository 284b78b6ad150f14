"""The plan of a training run: what it counts is what the model does, and it needs neither weights nor data."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import BITS, tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import stages.cli
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.model import BitDanceModel
from bitdance.sequence.batch import ImagePiece, TextPiece, TrainingBatch, build_batch
from bitdance.sequence.noise import ImageNoise
from lfq_tokenizer import TokenizerConfig
from lfq_tokenizer.scale_vae import ScaleConfig
from lfq_tokenizer.text import time_text
from stages.config import DataConfig, DeepSpeedConfig, GeneratorTraining, RunConfig, TrainingConfig, load_config
from stages.engine.ema import AveragedAdamW
from stages.measure.memory import Case
from stages.plan import memory
from stages.plan.fit import divide
from stages.plan.flops import Document, document_flops, encoder_flops, token_flops
from stages.plan.shape import Shape, count
from stages.plan.workload import Workload

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PRETRAIN = str(ROOT / "configs/14b/pretrain.toml")
SMALL = TrainingConfig(
    "generator",
    RunConfig(out="r", batch_size=4),
    DataConfig(train=("s",), mix={"32": 1, "64": 1}, row_tokens=320),
    generator=GeneratorTraining(),
)
SHAPE = Shape(
    {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    700,
    16,
    HeadConfig(8, 64, 128, depth_latent=2, depth_adanln=1, parallel_num=16, diff_batch_mul=2),
    TokenizerConfig(32, (1, 1, 1), 1, 8),
)
SHORT = replace(SHAPE, backbone={**SHAPE.backbone, "num_hidden_layers": 2})


def small_batch(model: BitDanceModel, caption: int = 10) -> TrainingBatch:
    workload = Workload.of(SMALL, SHAPE, caption)
    batch = workload.batch(workload.fullest(4), model.special, 8, 1)
    batch.noise = ImageNoise.draw(batch.image_bits_NC.shape[0], SHAPE.head, 0.1, torch.Generator().manual_seed(0))
    return batch


@pytest.mark.parametrize("frozen", [(), ("backbone",), ("backbone", "projector")])
def test_flops_are_those_that_torch_counts(frozen: tuple[str, ...]) -> None:
    model = tiny_model(P=4).train()
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    text, h, w = 9, 8, 4
    piece = ImagePiece(torch.ones(BITS, h, w))
    batch = build_batch([[TextPiece([5] * text, predict=True), piece]], 2, model.special)
    counter = FlopCounterMode(display=False)
    with counter:
        model(batch, torch.Generator().manual_seed(0)).total.backward()
    document = Document(text, h, w, 4)
    found = document_flops(model, document)
    assert document.length == batch.tokens
    # torch counts every pair of positions, and not the pairs that the mask leaves
    every_pair = found.attention * document.length**2 / document.pairs
    counted = counter.get_total_flops()
    assert found.useful - found.attention + every_pair == pytest.approx(counted, rel=0.05)
    grids = {(h, w): 1.0}
    assert token_flops(model, grids, text) == pytest.approx(found.useful / document.length)


def test_pairs_are_those_of_the_mask() -> None:
    from bitdance.sequence.mask import dense_mask

    model = tiny_model(P=4)
    batch = build_batch([[TextPiece([5] * 7), ImagePiece(torch.ones(BITS, 6, 4))]], 2, model.special)
    assert Document(7, 6, 4, 4).pairs == int(dense_mask(batch.doc_BL, batch.block_BL).sum())


def test_encoding_counts_pixels() -> None:
    once, four = (encoder_flops(SHAPE.tokenizer, side, side) for side in (32, 64))
    assert four == pytest.approx(4 * once) and once > 0


def test_parameters_are_those_of_the_published_model() -> None:
    config = load_config(PRETRAIN)
    shape = Shape.of(config)
    with torch.device("meta"):
        counts = count(shape.model(config.generator, torch.bfloat16))
    assert shape.vocabulary == 151_940 and shape.absent
    assert counts["head"].all == 1_758_464_032 and counts["projector"].all == 26_388_480
    assert counts["tokenizer"].all == 460_294_179 and counts["tokenizer"].trained == 0
    assert counts["backbone: embedding"].all == counts["backbone: output"].all == 151_940 * 5120


@pytest.mark.parametrize(("precision", "checkpoint"), [("float32", False), ("float32", True), ("bfloat16-weights", False)])
def test_activations_kept_are_those_that_autograd_keeps(precision: str, checkpoint: bool) -> None:
    training = replace(SMALL.generator, checkpoint_activations=checkpoint)
    dtype = torch.bfloat16 if precision == "bfloat16-weights" else torch.float32
    torch.manual_seed(0)
    model = SHORT.model(training, dtype)
    batch = small_batch(model)
    weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage()._cdata) not in weights:
            held[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    # beside them the batch is there, also those of its tensors that no gradient needs
    inputs = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in memory._tensors(batch)}
    kept = sum({**inputs, **{place: t.untyped_storage().nbytes() for place, t in held.items()}}.values())
    planned = memory.activations(SHORT, training, precision, batch, dense=True)
    assert planned.kept == pytest.approx(kept, rel=0.15)
    assert planned.most > planned.kept


def test_checkpointing_and_bfloat16_keep_less() -> None:
    with torch.device("meta"):
        model = SHAPE.model(SMALL.generator, torch.float32)
    batch = small_batch(model)
    plain = memory.activations(SHORT, SMALL.generator, "float32", batch, dense=True)
    again = memory.activations(SHORT, replace(SMALL.generator, checkpoint_activations=True), "float32", batch, dense=True)
    half = memory.activations(SHORT, SMALL.generator, "bfloat16-weights", batch, dense=True)
    assert again.kept < 0.5 * plain.kept and half.kept < 0.75 * plain.kept


def test_layers_beyond_the_third_add_what_the_third_adds() -> None:
    model = SHAPE.model(SMALL.generator, torch.float32)
    batch = small_batch(model)
    planned = memory.activations(SHAPE, SMALL.generator, "float32", batch, dense=True)
    whole = memory._micro_step(SHAPE, SMALL.generator, "float32", batch, dense=True, layers=4)
    assert planned.kept == pytest.approx(whole.kept, rel=0.01) and planned.most == pytest.approx(whole.most, rel=0.01)


def test_states_are_those_that_the_optimizer_holds() -> None:
    model = torch.nn.Linear(100, 30)
    adam = AveragedAdamW([{"params": list(model.parameters())}], 0.9, lr=1e-3)
    model(torch.ones(1, 100)).sum().backward()
    adam.step()
    weights = sum(p.nbytes for p in model.parameters())
    held = {name: sum(s[name].nbytes for s in adam.state.values()) for name in ("exp_avg", "exp_avg_sq", "average")}
    states = memory.states(3030, 0, 3000, "float32", True, DeepSpeedConfig(), 1)
    assert (states.weights, states.gradients, states.average) == (weights, weights, held["average"])
    assert states.optimizer == held["exp_avg"] + held["exp_avg_sq"]


def test_states_of_the_stages_of_zero() -> None:
    def kept(stage: int, processes: int, **more: bool) -> memory.States:
        deepspeed = DeepSpeedConfig(stage, **more)
        return memory.states(1000, 0, 10, "bfloat16-weights", True, deepspeed, processes)

    assert kept(1, 4).kept == 2000 + 4000 + (4 + 8 + 4) * 250
    assert kept(2, 4).kept == 2000 + (4 + 4 + 8 + 4) * 250
    assert kept(3, 4).kept == (2 + 4 + 4 + 8 + 4) * 250
    moved = kept(3, 4, offload_optimizer=True)
    assert moved.kept == 2 * 250 and moved.host == (4 + 4 + 8 + 4) * 250
    assert kept(3, 4, offload_optimizer=True, offload_parameters=True).kept == 0


@pytest.mark.parametrize(
    ("samples", "processes", "wanted", "batch"),
    [(2560, 64, 10, (10, 4)), (2560, 8, 10, (10, 32)), (2560, 512, 10, (5, 1)), (2560, 5120, 10, (1, 1)), (100, 3, 10, (3, 11))],
)
def test_other_numbers_of_processes_keep_the_samples_of_a_step(
    samples: int, processes: int, wanted: int, batch: tuple[int, int]
) -> None:
    assert divide(samples, processes, wanted) == batch


def test_the_fullest_micro_step_is_one_that_the_mix_deals_out() -> None:
    config = replace(SMALL, data=replace(SMALL.data, mix={"32": 3, "64": 1}))
    workload = Workload.of(config, SHAPE, 10)
    assert sorted(workload.pattern) == [32, 32, 32, 64]
    assert workload.fullest(1) == (64,) and workload.fullest(4) == (32, 32, 32, 64)
    assert workload.fullest(2) == (32, 64)


def dry_run(*arguments: str) -> int:
    return stages.cli.train([*arguments, "--dry-run"])


FAST = ["--set", "generator.backbone.num_hidden_layers=2", "--set", "generator.sample_prompts=['a']"]


def test_a_dry_run_needs_no_weights_and_no_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo = [str(ROOT / "configs/demo/pretrain.toml"), "--set", "generator.tokenizer=demo", "--set", f"run.out={tmp_path / 'r'}"]
    absent = ["--set", "data.train=['nowhere/*.tar']", "--set", "run.batch_size=20"]
    assert dry_run(*demo, *absent, "--json", "--processes", "2,4") == 0
    plan = json.loads(capsys.readouterr().out)
    two, four = plan["columns"]
    assert (two["samples"], four["samples"], plan["samples"]) == (40, 40, 40)
    assert four["batch_size"] == 10 and four["hours"] == pytest.approx(two["hours"] / 2)
    assert "nowhere" in plan["data"]["absent"]
    assert not (tmp_path / "r").exists()


def test_what_does_not_fit_is_said_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    demo = [str(ROOT / "configs/demo/pretrain.toml"), "--set", "generator.tokenizer=demo"]
    demo += ["--set", "data.train=['nowhere/*.tar']", "--set", "generator.backbone.num_hidden_layers=2"]
    demo += ["--set", "run.batch_size=20"]
    assert dry_run(*demo, "--gpu-memory", "0.3") == 0
    out = capsys.readouterr().out
    assert "NO" in out and "training does not fit; try generator.checkpoint_activations = true or run.batch_size = " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "8,x"], "--processes '8,x'"),
        (["--mfu", "1.5"], "the MFU at most 1"),
        (["--gpu-memory", "nan"], "--gpu-memory: 'nan'; a finite number of at most 64 bits is allowed"),
        (["--peak-tflops", "-1"], "--peak-tflops = -1.0; a number above 0"),
        (["--processes", "0"], "--processes = 0; a whole number from 1"),
        (["--caption-tokens", "0"], "--caption-tokens = 0; a whole number from 1"),
        (["--set", "data.mix={100 = 1}"], "data.mix names 100 pixels, no multiple of 64"),
        (["--set", "generator.head.ch_latent=100"], "ch_latent = 100"),
        (["--set", "run.stepz=1"], "did you mean run.steps?"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(PRETRAIN, *FAST, *arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_without_a_gpu_the_plan_is_for_this_processor_in_a_time_that_can_be_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = [str(ROOT / "configs/demo/pretrain.toml"), "--set", "data.train=['nowhere/*.tar']", *FAST]
    small = [*demo, "--set", "generator.tokenizer=demo", "--set", "run.steps=100"]
    monkeypatch.setattr("stages.engine.step_metrics.peak_flops", lambda device, precision: 50e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert dry_run(*small) == 0
    out = capsys.readouterr().out
    assert "GPUs  " not in out and "this processor: fits" in out and "peak of this processor 50 GFLOP/s" in out
    (time,) = re.findall(r"time at an MFU of 40%\s+([\d.]+) (?:seconds|minutes|hours)\n", out)
    assert float(time) > 0
    assert dry_run(*small, "--processes", "1", "--json") == 0  # where GPUs are described it is for them
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == "gpu" and plan["machine"]["tflops"] == 989 and plan["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 seconds"),
        (1, "1 second"),
        (89, "89 seconds"),
        (180, "3.0 minutes"),
        (39 * 60, "39 minutes"),
        (3600 * 3.4, "3.4 hours"),
        (86_400 * 5, "5.0 days"),
        (86_400 * 365.25 * 569, "569 years"),
    ],
)
def test_a_time_is_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_the_three_stages_of_14b_are_a_chain() -> None:
    stages_ = [load_config(ROOT / f"configs/14b/{name}.toml") for name in ("pretrain", "continue", "finetune")]
    for before, after in itertools.pairwise(stages_):
        assert after.generator.init == before.run.out
        assert (after.generator.backbone, after.generator.head) == (before.generator.backbone, before.generator.head)
    assert [c.run.steps for c in stages_] == [100_000, 40_000, 40_000]
    assert all(c.run.batch_size * c.run.accumulation * 64 == 2560 for c in stages_)


def test_the_cases_that_are_measured_can_be_built() -> None:
    case = Case(layers=2, hidden=128, pictures=1)
    with torch.device("meta"):
        model = case.shape().model(case.config().generator, torch.float32)
    assert count(model)["backbone: layers"].all > 0


@pytest.mark.parametrize("decode", [False, True])
def test_patches_of_latents_change_nothing_of_a_tokenizers_memory(decode: bool) -> None:
    plain = TokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8)
    scales = ScaleConfig("bits", 8, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    for pair in ((plain, replace(plain, patch=4)), (scales, replace(scales, patchify=True))):
        peaks = [memory.tokenizer_peak(config, 2, 32, 64, decode) for config in pair]
        assert peaks[0] == peaks[1] > 0
