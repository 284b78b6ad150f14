"""`bitdance verify` finds what is wrong with a folder, measures differences tensor by tensor, and agreement teacher-forced."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdance.cli import main
from bitdance.folder.checkpoint import load_model
from bitdance.folder.conversion import convert
from bitdance.folder.source import StoredModel
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.settings import Sampling
from bitdance.sequence.patches import PatchPlan
from bitdance.verify.agree import agreement, forced_predictions, reference_bits
from bitdance.verify.compare import difference
from bitdance.verify.examine import BACKBONE_14B, HEAD_14B, PROJECTOR_14B, TOKENIZERS, examine, value_range
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors, write_safetensors

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parent / "golden" / "t2i_ckpt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def verify(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert main(["verify", *argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def change(path: Path, name: str, index: int, value: float) -> None:
    tensors = read_safetensors(path)
    tensors[name].view(-1)[index] = value
    write_safetensors(tensors, path)


def test_a_sound_model_is_told_by_parts_and_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    facts = verify(capsys, str(MODEL))
    counts = {name: part["parameters"] for name, part in facts["parts"].items()}
    assert counts == {"backbone": 187_392, "head": 572_680, "projector": 4_736, "tokenizer": 448_971}
    assert facts["problems"] == [] and facts["not_finite"] == []
    for name, file in facts["files"].items():
        assert file["sha256"] == hashlib.sha256((MODEL / name).read_bytes()).hexdigest()
    assert main(["verify", str(MODEL)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing wrong"


def test_the_first_ten_tensors_that_are_not_finite_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "vision_head.safetensors"
    names = sorted(read_safetensors(path))[:12]
    for i, name in enumerate(names):
        change(path, name, i % 8, float("nan") if i % 2 else float("inf"))
    facts = verify(capsys, str(folder), code=1)
    assert {row["name"] for row in facts["not_finite"]} == set(names) and all(row["numbers"] == 1 for row in facts["not_finite"])
    (problem,) = facts["problems"]
    assert problem.startswith("12 tensors hold NaN or infinity: head ") and problem.endswith(", and 2 more")
    assert problem.count("(1 of ") == 10


def test_pieces_are_looked_at_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdance.verify.examine.PIECE", 4)
    numbers = torch.arange(10.0).bfloat16()
    assert value_range(numbers) == (0.0, 9.0, 0)
    numbers[9] = float("-inf")
    assert value_range(numbers)[2] == 1
    assert value_range(torch.tensor([1e300, float("nan")], dtype=torch.float64))[2] == 1
    monkeypatch.setattr("bitdance.verify.compare.PIECE", 4)
    assert difference(torch.zeros(10), torch.arange(10.0)) == (9.0, 4.5)
    assert difference(torch.zeros(10), numbers.float()) == (None, None)


def test_a_tensor_of_one_number_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = verify(capsys, str(folder))
    path = folder / "projector.safetensors"
    tensors = read_safetensors(path)
    name = next(iter(tensors))
    write_safetensors({**tensors, name: torch.zeros_like(tensors[name])}, path)
    after = verify(capsys, str(folder))
    assert f"projector {name} = 0" in after["constant"] and f"projector {name} = 0" not in before["constant"]


def test_everything_that_can_be_read_is_looked_at_beside_what_is_broken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "projector.safetensors").unlink()
    path = folder / "vision_head.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    change(folder / "ae.safetensors", next(iter(read_safetensors(folder / "ae.safetensors"))), 0, float("nan"))
    problems = verify(capsys, str(folder), code=1)["problems"]
    assert any("projector.safetensors is missing" in problem for problem in problems)
    assert any("vision_head.safetensors" in problem and "not a whole safetensors file" in problem for problem in problems)
    assert any(problem.startswith("1 tensors hold NaN") for problem in problems)


def test_an_index_that_names_the_wrong_file_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = read_safetensors(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        write_safetensors({name: tensors[name] for name in names if files[name] == file}, folder / file)
    write_json({"metadata": {}, "weight_map": files}, folder / "model.safetensors.index.json")
    (folder / "model.safetensors").unlink()
    assert verify(capsys, str(folder))["problems"] == []
    first, second = names[:2]
    write_json({"weight_map": {**files, first: files[second]}}, folder / "model.safetensors.index.json")
    (problem,) = verify(capsys, str(folder), code=1)["problems"]
    assert problem == f"model.safetensors.index.json names the wrong file for {first}"


def test_published_counts_are_those_of_the_published_shapes() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitdance.costs.shapes import SHAPES
    from bitdance.heads.diffusion.network import BinaryDiffusionHead
    from bitdance.networks.projector import Projector
    from lfq_tokenizer import LFQTokenizer

    shape = SHAPES["14b-64x"]
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**shape.backbone, "vocab_size": 151_936}))
        count = sum(p.numel() for p in lm.parameters())
        assert count == 14_768_307_200 and count - 2 * 151_936 * 5_120 == BACKBONE_14B  # Qwen3-14B
        assert sum(p.numel() for p in BinaryDiffusionHead(shape.head).parameters()) == HEAD_14B
        assert sum(p.numel() for p in Projector(32, 5120).parameters()) == PROJECTOR_14B
        for config, (_, number) in TOKENIZERS.items():
            assert sum(p.numel() for p in LFQTokenizer(config).parameters()) == number


def test_a_published_shape_with_another_count_is_wrong(folder: Path) -> None:
    config = read_json(folder / "vision_head_config.json")
    wide = {"ch_target": 32, "ch_cond": 5120, "ch_latent": 5120, "depth_latent": 6, "depth_adanln": 2, "use_swiglu": True}
    write_json({**config, **wide}, folder / "vision_head_config.json")
    facts = examine(folder)
    assert facts["parts"]["head"]["published"] == {
        "name": "14B-4x", "parameters": HEAD_14B, "counted": 572_680, "equal": False
    }  # fmt: skip
    assert any("head has 572,680 parameters, the published 14B-4x 1,758,464,032" in text for text in facts["problems"])


def test_the_same_folder_twice_is_equal_bit_for_bit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(capsys, str(MODEL), "--against", str(folder), "--tolerance", "0")["difference"]
    assert found["equal"] == len(found["tensors"]) > 50
    assert all(row["max"] == row["mean"] == 0 for row in found["tensors"])
    assert found["configs"] == {} and found["texts_that_differ"] == []


def test_the_tensors_that_differ_are_named_worst_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "projector.safetensors"
    name = next(name for name, tensor in read_safetensors(path).items() if tensor.ndim == 2)
    before = read_safetensors(path)[name]
    change(path, name, 3, float(before.view(-1)[3]) + 2.0)
    config = read_json(folder / "config.json")
    write_json({**config, "attention_dropout": 0.25}, folder / "config.json")
    found = verify(capsys, str(MODEL), "--against", str(folder))["difference"]
    (row,) = [row for row in found["tensors"] if not row["equal"]]
    assert (row["part"], row["name"]) == ("projector", name)
    assert row["max"] == pytest.approx(2.0) and row["mean"] == pytest.approx(2.0 / before.numel())
    assert found["configs"]["config.json attention_dropout"][1] == 0.25
    assert main(["verify", str(MODEL), "--against", str(folder)]) == 0
    assert f"  projector {name}: max 2, mean" in capsys.readouterr().out
    (problem,) = verify(capsys, str(MODEL), "--against", str(folder), "--tolerance", "1.5", code=1)["problems"]
    assert problem == f"1 tensors are more than 1.5 apart: projector {name}"
    assert verify(capsys, str(MODEL), "--against", str(folder), "--tolerance", "2.5")["problems"] == []


def test_other_words_are_a_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = read_json(folder / "tokenizer.json")
    text["model"]["merges"] = text["model"]["merges"][5:]
    write_json(text, folder / "tokenizer.json")
    found = verify(capsys, str(MODEL), "--against", str(folder), code=1)
    assert any("the text tokenizers give other tokens" in problem for problem in found["problems"])


def test_bits_foreseen_from_a_models_own_bits_are_these_bits() -> None:
    model = load_model(MODEL, "cpu", torch.float32)
    prompts, seeds = ["a cat", "a longer prompt about a dog"], [4, 9]
    for sampling in (Sampling(3, 2.0), Sampling(3, 1.0, "euler"), Sampling(4, 3.0, last_steps=2)):
        bits_BChw = reference_bits(model, prompts, 4, 6, sampling, seeds)
        both = generate_bits(model, prompts, 4, 6, sampling, [torch.Generator().manual_seed(seed) for seed in seeds])
        assert torch.equal(bits_BChw, both)
        plan = PatchPlan(4, 6, model.patch_side)
        predicted_BMPC = forced_predictions(model, prompts, bits_BChw, sampling, seeds)
        assert torch.equal(predicted_BMPC.flatten(1, 2) > 0, plan.order(bits_BChw) > 0)


def test_a_block_is_foreseen_from_the_bits_before_it() -> None:
    model, sampling = load_model(MODEL, "cpu", torch.float32), Sampling(2, 2.0)
    bits_BChw = reference_bits(model, ["a cat"], 4, 4, sampling, [0])
    changed = bits_BChw.clone()
    changed[:, :, 2:, :2] *= -1  # all of block 2 of 0, 1, 2, 3
    first, second = (forced_predictions(model, ["a cat"], bits, sampling, [0]) for bits in (bits_BChw, changed))
    assert torch.equal(first[:, :3], second[:, :3]) and not torch.equal(first[:, 3], second[:, 3])


def test_agreement_counts_signs() -> None:
    first = torch.tensor([0.9, -0.5, 0.1, -0.1]).view(1, 2, 1, 2)
    found = agreement(first, first * torch.tensor([1.0, 1.0, -1.0, 1.0]).view(1, 2, 1, 2))
    assert (found["bits"], found["agree"], found["differ"]) == (4, 0.75, 1)
    assert found["agree_by_block"] == [1.0, 0.5] and found["mean_difference"] == pytest.approx(0.05)


def test_bfloat16_agrees_with_float32_in_nearly_all_bits(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "32", "--width", "32", "--steps", "3", "--device", "cpu"]
    found = verify(capsys, str(MODEL), "--dtype", "bfloat16", "--pictures", "2", *size)["agreement"]
    assert found["reference"]["dtype"] == "float32" and found["compared"]["dtype"] == "bfloat16" and found["seeds"] == [0, 1]
    assert 0.97 < found["agree"] < 1 and found["mean_difference"] > 0
    asked = [str(MODEL), "--dtype", "bfloat16", "--pictures", "2", *size, "--at-least", "1"]
    assert "at least 100.000 % were asked for" in verify(capsys, *asked, code=1)["problems"][0]


def test_the_same_weights_in_two_folders_agree_in_all_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "32", "--width", "32", "--steps", "2", "--device", "cpu"]
    found = verify(capsys, str(MODEL), "--against", str(folder), "--prompt", "a", *size)["agreement"]
    assert (found["agree"], found["mean_difference"], found["prompts"]) == (1.0, 0.0, ["a"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "no model folder 'nowhere'"),
        ([str(MODEL), "--against", "nowhere"], "no model folder 'nowhere'"),
        ([str(MODEL), "--pictures", "2", "--device", "cpu"], "both sides would be the same model in float32"),
        ([str(MODEL), "--tolerance", "0"], "--tolerance is a number from 0 on, and needs --against"),
        ([str(MODEL), "--dtype", "float16", "--at-least", "99"], "at_least = 99; a number from 0 to 1 is allowed"),
        ([str(MODEL), "--dtype", "float16", "--pictures", "0"], "pictures = 0; a whole number from 1 to"),
        ([str(MODEL), "--dtype", "float16", "--device", "cpu", "--prompts", "no.txt"], "--prompts no.txt: No such file"),
        ([str(MODEL), "--dtype", "float16", "--device", "cpu", "--height", "33"], "is not supported"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *argv]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""


def test_a_diffusers_folder_equals_the_one_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(StoredModel.open(MODEL), tmp_path / "port", "diffusers")
    facts = verify(capsys, str(tmp_path / "port"), "--against", str(MODEL), "--tolerance", "0")
    assert facts["difference"]["equal"] == len(facts["difference"]["tensors"]) == facts["tensors"]
    assert facts["difference"]["configs"] == {} and facts["model"] == "port"
    assert "diffusion_head/diffusion_pytorch_model.safetensors" in facts["files"]
