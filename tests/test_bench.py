"""`bitdance bench`: what it counts is what the model does, the yardstick makes the same bits, and a floor needs no model."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitdance import BitDancePipeline
from bitdance.bench.measure import baseline, pipeline, take_turns
from bitdance.bench.models import bare_model, random_model
from bitdance.bench.phases import PHASES
from bitdance.bench.plain import generate_plain
from bitdance.cli import main
from bitdance.costs.peak import Peak, measure_peak
from bitdance.costs.shapes import SHAPES
from bitdance.costs.work import Generation, Work, evaluations, turning_batch, work
from bitdance.folder.checkpoint import load_model
from bitdance.folder.config import ModelConfig
from bitdance.folder.parts import DEMO
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.sequence.prompt import conditional_ids, unconditional_ids
from lfq_tokenizer import LFQTokenizer, TokenizerConfig

pytestmark = pytest.mark.slow

PROMPT = "a red cube"
SIZE = 64, 32
QWEN3 = {
    **SHAPES["mid"].backbone,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
}
TINY = ModelConfig("tiny", QWEN3, HeadConfig(8, 64, 128, 2, 1, 4), TokenizerConfig(32, (2, 1, 1, 1), 1, 8), SIZE)
PLAIN_MLP = dataclasses.replace(TINY, head=dataclasses.replace(TINY.head, use_swiglu=False, time_shift=2.0))
SAMPLINGS = [
    Sampling(3, 7.5),
    Sampling(3, 1.0),
    Sampling(5, 7.5, guidance_interval=(0.3, 0.7), last_steps=2),
    Sampling(2, 3.0, "euler"),
]
MODEL_PHASES = ("prefill", "llm", "head", "projector")


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def order_of(model: BitDanceModel, sampling: Sampling, batch: int, **changes: Any) -> Generation:
    text = len(conditional_ids(model.text_tokenizer, PROMPT)), len(unconditional_ids(model.text_tokenizer))
    return Generation(*SIZE, batch, sampling, text, **{"itemsize": 4, **changes})


@pytest.fixture
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peaks of small products, and torch's threads as they were."""
    monkeypatch.setattr("bitdance.bench.study.measure_peak", partial(measure_peak, side=128, repeats=1))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def linear_weights(*parts: nn.Module) -> int:
    return sum(m.weight.numel() for part in parts for m in part.modules() if isinstance(m, nn.Linear))


# shapes


def test_published_shapes_have_the_published_parameters() -> None:
    for name in ("14b-64x", "14b-16x"):
        model = bare_model(SHAPES[name])
        counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
        assert (counts["head"], counts["projector"]) == (1_758_464_032, 26_388_480)
        layers = counts["backbone"] - model.backbone.vocabulary_size * 5120
        assert layers == 14_768_307_200 - 2 * 151_936 * 5120  # Qwen3-14B without its embedding and its output
        assert all(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta"):
        assert sum(p.numel() for p in LFQTokenizer(SHAPES["14b-64x"].tokenizer).parameters()) == 460_294_179


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_make_bits_that_follow_from_all_of_the_work(dtype: torch.dtype) -> None:
    model = random_model(TINY, "cpu", dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.isfinite().all() and p.any() for p in model.parameters())
    assert model.backbone.lm.base_model.rotary_emb.inv_freq.dtype == torch.float32
    bits = generate_bits(model, [PROMPT], 8, 4, Sampling(3), seeded(1))
    other = generate_bits(model, ["a blue cube"], 8, 4, Sampling(3), seeded(1))
    assert 0.05 < (bits != other).float().mean() < 0.95
    again = random_model(TINY, "cpu", dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.gpu
def test_random_weights_are_drawn_on_the_gpu_and_phases_are_timed_there() -> None:
    contender = pipeline(BitDancePipeline(random_model(TINY, "cuda", torch.bfloat16)), Sampling(3), *SIZE, 2)
    take_turns([contender], 2)
    assert contender.peak_memory and contender.median()["head"] > 0


# work


@pytest.mark.parametrize("shape", [TINY, PLAIN_MLP], ids=["swiglu", "mlp"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_operations_are_those_that_torch_counts(shape: ModelConfig, sampling: Sampling) -> None:
    model = random_model(shape, "cpu", torch.float32)
    sample, arguments = BlockSampler(model.head), (model, [PROMPT] * 2, 8, 4, sampling)
    generate_bits(*arguments, seeded(1, 2), block_sampler=sample)  # embeds the times
    found = work(shape, order_of(model, sampling, 2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # torch counts no fused attention on CPUs
        bits = generate_bits(*arguments, seeded(1, 2), block_sampler=sample)
    assert sum(found[phase].flops for phase in MODEL_PHASES) == counter.get_total_flops()
    assert model.tokenizer is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for picture in bits:
            model.tokenizer.decode(picture[None])
    assert found["decode"].flops == counter.get_total_flops()


@pytest.mark.parametrize("folder", [DEMO, GOLDEN / "t2i_ckpt"], ids=["demo", "golden"])
def test_a_folder_has_the_shape_of_its_model(folder: Path) -> None:
    shape, model = ModelConfig.of_folder(folder), load_model(folder, "cpu", generation_only=True)
    for ours, theirs in zip(bare_model(shape).children(), model.children(), strict=True):
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    attention = model.backbone.lm.base_model.layers[0].self_attn
    assert shape.backbone["num_attention_heads"] * shape.head_dim == attention.q_proj.out_features
    assert shape.key_heads * shape.head_dim == attention.k_proj.out_features


def test_every_call_reads_its_weights_once() -> None:
    model, sampling, M = bare_model(TINY), Sampling(3, 7.5), 8
    found = work(TINY, order_of(model, sampling, 2, itemsize=0, backbone_weight=1, head_weight=1))
    assert found["prefill"].bytes == linear_weights(model.backbone)
    assert found["llm"].bytes == (M - 1) * linear_weights(model.backbone)
    assert found["head"].bytes == M * 4 * linear_weights(model.head.net.res_blocks)


def test_quantised_weights_are_fewer_bytes_and_the_same_operations(capsys: pytest.CaptureFixture[str]) -> None:
    def roofline(*quantised: str) -> Any:
        assert main(["bench", "--shape", "14b-64x", "--floor", "790e12,4.3e12", "--json", *quantised]) == 0
        return json.loads(capsys.readouterr().out)["runs"][0]["phases"]

    whole, small = roofline(), roofline("--quantize", "int4", "--quantize-head", "int8")
    assert whole["total"]["flops"] == small["total"]["flops"]
    assert small["llm"]["bytes"] < 0.35 * whole["llm"]["bytes"]  # 4 bits of 16, and cache and activations as before
    assert 0.5 < small["head"]["bytes"] / whole["head"]["bytes"] < 0.65  # modulations and activations as before


def test_a_guidance_interval_saves_evaluations_of_the_other_branch() -> None:
    assert evaluations(Sampling(4, 7.5), 4) == [2, 2, 2, 2, 2]
    assert evaluations(Sampling(4, 1.0), 4) == [1, 1, 1, 1, 1]
    assert evaluations(Sampling(4, 7.5, guidance_interval=(0.2, 0.6)), 4) == [1, 2, 2, 1, 1]


def test_a_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    peak = Peak(100.0, 10.0)
    assert Work(500, 10).roofline(peak) == 5.0
    assert Work(100, 40).roofline(peak) == 4.0


def test_peaks_are_measured() -> None:
    peak = measure_peak("cpu", torch.float32, side=128, repeats=2)
    assert peak.flops_per_s > 1e8 and peak.bytes_per_s > 1e8 and peak.kernel in ("torch", "oneDNN")


# the yardstick


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_the_yardstick_makes_the_bits_of_the_published_weights(guidance: float) -> None:
    model = load_model(GOLDEN / "t2i_ckpt", "cpu")
    plain = generate_plain(model, PROMPT, 8, 6, 4, guidance, seeded(1, 2))
    assert torch.equal(plain, generate_bits(model, [PROMPT] * 2, 8, 6, Sampling(4, guidance), seeded(1, 2)))


@pytest.mark.parametrize(("P", "swiglu", "time_shift"), [(16, True, 1.0), (64, True, 1.0), (4, False, 2.0)])
def test_the_yardstick_makes_the_bits_that_users_get(P: int, swiglu: bool, time_shift: float) -> None:
    head = dataclasses.replace(TINY.head, parallel_num=P, use_swiglu=swiglu, time_shift=time_shift)
    shape = dataclasses.replace(TINY, head=head)
    ours = pipeline(BitDancePipeline(random_model(shape, "cpu", torch.float32)), Sampling(4, 7.5), 128, 64, 2)
    plain = baseline(random_model(shape, "cpu", torch.float32), 4, 7.5, 128, 64, 2)
    take_turns([plain, ours], 1)
    assert ours.bits is not None and plain.bits is not None
    assert torch.equal(ours.bits, plain.bits)


def test_the_yardstick_wastes_what_the_published_procedure_wastes() -> None:
    model, backbone_calls, conditions = random_model(TINY, "cpu", torch.float32), [], []
    model.backbone.register_forward_hook(lambda module, args, output: backbone_calls.append(args[0].shape[1]))
    model.head.net.cond_embed.register_forward_hook(lambda *_: conditions.append(1))
    generate_plain(model, PROMPT, 8, 4, 3, 7.5, seeded(1))
    M, branches = 8, 2
    assert len(backbone_calls) == branches * (2 + M)  # prefix and block 0 apart, and one call after the last block
    assert len(conditions) == M * (3 + 1)


# the clock


def test_phases_are_all_of_the_time_and_the_hooks_go() -> None:
    model = random_model(TINY, "cpu", torch.float32)
    contender = pipeline(BitDancePipeline(model), Sampling(3), *SIZE, 1)
    take_turns([contender], 3)
    assert len(contender.wall) == 3
    spent = contender.median()
    assert set(spent) == {*PHASES, "total"}
    assert all(spent[phase] > 0 for phase in (*MODEL_PHASES, "decode", "png"))
    assert spent["head"] > spent["projector"]
    assert not model.backbone._forward_hooks and not model.projector._forward_pre_hooks


# the command


def test_the_command_says_it_all_as_json(capsys: pytest.CaptureFixture[str], few_repeats: None) -> None:
    small = ["--height", "64", "--width", "64", "--steps", "2", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    settings = ["--preset", "published", "--batch", "1", "2", "--dtype", "float32", "bfloat16", "--yardstick", "--json"]
    assert main(["bench", *small, *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shape"], found["weights"], found["blocks"]) == ("demo", "trained", 4)
    assert found["machine"]["clock"] == "CPU time"
    assert set(found["peaks"]) == {"float32", "bfloat16"}
    assert [(run["dtype"], run["batch"]) for run in found["runs"]] == [
        (dtype, batch) for batch in (1, 2) for dtype in ("float32", "bfloat16")
    ]
    for run in found["runs"]:
        assert run["images_per_s"] == pytest.approx(run["batch"] / run["seconds"])
        assert run["yardstick"]["times_faster"] > 0
        assert run["yardstick"].get("equal_bits") == (1.0 if run["dtype"] == "float32" else None)
        head, total = run["phases"]["head"], run["phases"]["total"]
        assert head["flops_per_s"] == pytest.approx(head["flops"] / head["seconds"])
        assert head["share_of_peak"] == pytest.approx(head["flops_per_s"] / found["peaks"][run["dtype"]]["flops_per_s"])
        assert total["seconds"] == run["seconds"] and total["share"] == 1
    assert [plain_contender["batch"] for plain_contender in found["yardsticks"]] == [1, 2]


def test_the_command_shows_tables_and_writes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], few_repeats: None
) -> None:
    small = ["--height", "64", "--width", "64", "--steps", "2", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", *small, "--preset", "own", "published", "-o", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert [run["preset"] for run in json.loads((tmp_path / "found.json").read_text())["runs"]] == ["own", "published"]
    assert "| images/s" in shown and "float32, published" in shown and "of peak" in shown


@pytest.mark.parametrize("shape", SHAPES)
def test_a_floor_needs_no_model_and_no_machine(
    shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was built or measured")

    for name in ("open_model", "measure_peak", "pipeline"):
        monkeypatch.setattr(f"bitdance.bench.study.{name}", refuse)
    arguments = ["bench", "--shape", shape, "--floor", "790e12,4.3e12", "--batch", "1", "16"]
    assert main([*arguments, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    rooflines = [run["phases"]["total"]["floor_seconds"] for run in runs]
    assert [run["images_per_s"] for run in runs] == [pytest.approx(1 / rooflines[0]), pytest.approx(16 / rooflines[1])]
    assert rooflines[0] < rooflines[1] < 16 * rooflines[0]
    if shape == "14b-64x":
        # 64 × 51 evaluations read the head's 3.5 GB, 64 calls the 26.4 GB of the layers
        weights = (64 * 51 * 3.5e9 + 64 * 26.4e9) / 4.3e12
        assert weights < rooflines[0] < 1.1 * weights
    assert main(arguments) == 0
    assert "floor s" in capsys.readouterr().out


def floors(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["bench", "--shape", "14b-64x", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_evaluations_on_an_h200_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """51 and 2 evaluations of the published shape, guidance folded into the student: bytes set the pace of one picture."""
    runs = floors(capsys, "--floor", "h200", "--preset", "own", "quick")["runs"]
    layers = 40 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 17408)  # of the LLM
    head = 5120**2 * (6 * (3 + 1 + 3 + 1.5) + 2 * 6 + 2)  # attention and SwiGLU of 6 blocks, modulations
    seconds = {"own": 51 * 64 * 2 * head / 4.3e12 + 64 * 2 * layers / 4.3e12}
    seconds["quick"] = 2 * 64 * 2 * head / 4.3e12 + 64 * 2 * layers / 4.3e12
    for run in runs:
        found = run["phases"]["total"]["floor_seconds"]
        assert seconds[run["preset"]] < found < 1.1 * seconds[run["preset"]]
        assert run["sampling"]["guidance"] == (7.5 if run["preset"] == "own" else 1.0)
    assert [round(run["phases"]["total"]["floor_seconds"], 2) for run in runs] == [3.15, 0.54]


def test_from_which_batch_on_arithmetic_sets_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    """A call reads 2 bytes of every weight, and computes 2 operations for each of its 64 tokens of a picture (128 with guidance):
    790e12 / 4.3e12 = 184 tokens, so 1.4 pictures with guidance and 2.9 without, and a little more for activations."""
    found = floors(capsys, "--floor", "h200", "--preset", "own", "quick", "--batch", "1", "2", "3", "4")
    own, quick = found["turns"]
    assert (own["llm"], own["head"], quick["llm"], quick["head"]) == (2, 2, 3, 4)
    for turns in found["turns"]:
        for run in (run for run in found["runs"] if run["preset"] == turns["preset"]):
            for phase in ("prefill", "llm", "head", "decode"):
                work = run["phases"][phase]
                computing = work["flops"] / 790e12 >= work["bytes"] / 4.3e12
                assert computing == (run["batch"] >= turns[phase]), (turns["preset"], phase, run["batch"])
    assert turning_batch(Work(1.0, 10.0), Work(2.0, 20.0), Peak(1.0, 1.0)) is None  # every picture brings more bytes
    assert turning_batch(Work(4.0, 9.0), Work(8.0, 10.0), Peak(1.0, 1.0)) == 3  # 4·B ≥ 8 + B


def test_eight_gpus_make_eight_times_the_pictures_in_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    one, eight, said = (floors(capsys, "--floor", peak, "--batch", "2") for peak in ("h200", "8xH200", "8x790e12,4.3e12"))
    assert eight["runs"][0]["phases"] == one["runs"][0]["phases"] == said["runs"][0]["phases"]
    assert eight["runs"][0]["images_per_s"] == pytest.approx(8 * one["runs"][0]["images_per_s"])
    assert eight["peaks"]["bfloat16"] == {"flops_per_s": 790e12, "bytes_per_s": 4.3e12, "kernel": "H200", "devices": 8}
    assert main(["bench", "--shape", "mid", "--floor", "8xh200"]) == 0
    shown = capsys.readouterr().out
    assert "each of 8, which make pictures of their own" in shown and "| arithmetic from batch" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--floor", "0xh200"], "give h200 or h100"),
        (["--floor", "h300"], "give h200 or h100"),
        (["--shape", "15b"], "allowed are 14b-64x, 14b-16x, mid"),
        (["--shape", "mid", "--height", "100"], "multiples of 64"),
        (["--shape", "mid", "--height", "8192"], "up to 4096"),
        (["--height", "100"], "height 100"),
        (["--floor", "fast"], "790e12,4.3e12"),
        (["--floor", "1e12,-1"], "790e12,4.3e12"),
        (["--batch", "0"], "--batch"),
        (["--height", "0"], "--height"),
        (["-o", "nowhere/found.json"], "no folder 'nowhere'"),
        (["--preset", "quickest"], "preset = 'quickest'"),
        (["--preset", "quick"], "needs a model that was distilled to few evaluations"),
        (["--steps", "0"], "steps = 0"),
        (["--sampler", "dream"], "sampler = 'dream'"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--model", "nowhere"], "no model folder 'nowhere'"),
        (["--model", "demo", "--shape", "mid"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bitdance.costs.memory.free_main_memory", lambda root=Path("/"): 10**10)
    assert main(["bench", "--shape", "14b-64x", "--device", "cpu", "--dtype", "bfloat16"]) == 2
    assert "takes 32.1 GB of weights in bfloat16, and cpu has 10.0 GB free" in capsys.readouterr().err
