"""LoRA: train → load or merge → generate gives the same bits; resuming is exact; the recipe of docs/finetune on a tiny model."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stages.cli
from bitdance import BitDancePipeline, load_model
from bitdance.cli import main as bitdance
from bitdance.folder.adapters import Adapter
from bitdance.folder.checkpoint import save_model
from bitdance.folder.fingerprint import fingerprint
from bitdance.networks.backbone import Backbone
from bitdance.picture import read_metadata
from lfq_tokenizer.files import temporary_beside
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors
from stages.config import load_config
from stages.data.cli import main as data
from stages.engine.checkpoint import newest
from stages.export import export_adapter, export_checkpoint

pytestmark = pytest.mark.slow

pytest.importorskip("peft", reason="peft is not installed (extra train)")
ROOT = Path(__file__).parent.parent
LORA = ROOT / "configs" / "finetune" / "lora-demo.toml"
ASKED = {"seed": 3, "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "bits"}


def sets(**changes: str) -> list[str]:
    return [part for name, value in changes.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]


def settings(place: Path, out: Path, **changes: str) -> list[str]:
    usual = {
        "run__out": str(out),
        "run__steps": "2",
        "run__batch_size": "2",
        "run__sample_every": "100",
        "run__log_every": "1",
        "run__validate_every": "2",
        "data__sources": "[]",
        "data__train": json.dumps([str(place / "bits")]),
        "data__heldout": json.dumps([str(place / "bits")]),
        "optimizer__lr": "0.02",
        "optimizer__warmup_steps": "0",
        "generator__lora__rank": "4",
        "generator__sample_prompts": '["a zorb"]',
        "generator__defaults": "{height = 64, width = 64, num_inference_steps = 1, guidance_scale = 1.0}",
    }
    return [str(LORA), *sets(**usual | changes)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lora")
    spec = importlib.util.spec_from_file_location("twenty_pictures", ROOT / "examples" / "twenty_pictures.py")
    assert spec and spec.loader
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.draw(place / "pictures", {"white": (255, 255, 255), "blue": (37, 80, 220)}, count=4)
    assert data(["pack", "folder", str(place / "shards"), str(place / "pictures"), "--size", "64"]) == 0
    assert stages.cli.tokenizer(["encode", str(place / "shards"), str(place / "bits"), "--model", "demo"]) == 0
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    assert stages.cli.train(settings(place, place / "run")) == 0
    return place / "run"


@pytest.fixture(scope="module")
def adapter(place: Path, run: Path) -> Path:
    assert stages.cli.export([str(run), str(place / "adapter"), "--adapter"]) == 0
    return place / "adapter"


@pytest.fixture(scope="module")
def merged(place: Path, run: Path) -> Path:
    assert stages.cli.export([str(run), str(place / "merged")]) == 0
    return place / "merged"


def bits(pipe: BitDancePipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a zorb on a blue background", **ASKED).bits


def same_weights(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_loading_and_merging_give_the_same_weights_and_bits_and_unloading_the_base(adapter: Path, merged: Path) -> None:
    mark = fingerprint(Path(load_model("demo").folder))
    pipe = BitDancePipeline.from_pretrained("demo", device="cpu")
    before = bits(pipe)
    pipe.load_lora_weights(adapter)
    loaded, whole = bits(pipe), BitDancePipeline.from_pretrained(merged, device="cpu")
    assert same_weights(pipe.model, whole.model)
    assert torch.equal(loaded, bits(whole)) and not torch.equal(loaded, before)
    assert torch.equal(loaded, bits(BitDancePipeline.from_pretrained("demo", device="cpu", lora=adapter)))
    pipe.unload_lora_weights()
    assert torch.equal(bits(pipe), before) and same_weights(pipe.model, load_model("demo", device="cpu"))
    pipe.load_lora_weights(adapter, scale=0.0)
    assert same_weights(pipe.model, load_model("demo", device="cpu"))
    assert fingerprint(Path(pipe.model.folder)) == mark  # weights are mapped from files, which stay as they were


def test_in_bfloat16_too_the_merged_and_the_loaded_model_are_one(place: Path, run: Path, adapter: Path) -> None:
    assert stages.cli.export([str(run), str(place / "bf16"), "--dtype", "bfloat16"]) == 0
    loaded = load_model("demo", device="cpu", dtype=torch.bfloat16, lora=adapter)
    assert same_weights(loaded, load_model(place / "bf16", device="cpu", dtype=torch.bfloat16))


def test_what_was_trained_predicts_what_the_merged_model_predicts(run: Path, merged: Path) -> None:
    """The averaged weights of the checkpoint, two products apart, against their sum: equal up to rounding."""
    from peft import PeftModel

    base, whole = load_model("demo", device="cpu"), load_model(merged, device="cpu")
    apart = PeftModel.from_pretrained(base, str(newest(run) / "adapter")).eval()  # the layout is peft's own
    x = torch.randn(1, 12, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = whole.backbone(x), apart.base_model.model.backbone(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load_model("demo", device="cpu").backbone(x), wanted, atol=1e-2)


def test_a_checkpoint_holds_the_adapter_alone_and_trains_nothing_else(run: Path) -> None:
    folder = newest(run)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "manifest.json", "resume"]
    names = read_safetensors(folder / "resume" / "learner_00000.safetensors").keys()
    assert all("lora_" in name for name in names if not name.startswith("buffer/"))
    weights = read_safetensors(folder / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 and t.abs().max() > 0 for t in weights.values())
    said = read_json(folder / "adapter" / "bitdance.json")
    assert said["base"]["name"] == "demo" and [s["name"] for s in said["card"]["stages"]][-1] == "lora"
    assert str(run.parent) not in json.dumps(said)


def test_an_exported_adapter_is_readable_by_whom_the_umask_lets_and_what_a_killed_export_left_is_cleared(
    run: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(newest(run), tmp_path / "run" / newest(run).name)
    (checkpoint / "adapter" / "adapter_model.safetensors").chmod(0o600)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = temporary_beside(tmp_path / "out")
    left = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    left.mkdir()
    before = os.umask(0o027)
    try:
        export_adapter(checkpoint, tmp_path / "out")
    finally:
        os.umask(before)
    assert not left.exists() and (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("text", ["[]", "5", "{}", '{"generator": {}}', '{"generator": {"init": 5}}'])
def test_a_run_that_does_not_name_its_base_is_told_so(run: Path, tmp_path: Path, text: str) -> None:
    copied = shutil.copytree(newest(run), tmp_path / "run" / newest(run).name)
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json names no generator\.init.*--base"):
        export_checkpoint(copied, tmp_path / "out")


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_resuming_changes_nothing(place: Path, tmp_path: Path, zero: int) -> None:
    """With dropout, whose draws belong to the micro-step."""
    more = {"run__accumulation": "2", "deepspeed__zero_stage": str(zero), "generator__lora__dropout": "0.1"}
    for out, steps in (("whole", "2"), ("parts", "1"), ("parts", "2")):
        assert stages.cli.train(settings(place, tmp_path / out, **more | {"run__steps": steps})) == 0
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        one, other = read_safetensors(whole / path), read_safetensors(parts / path)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), path


def test_generate_names_the_adapter_in_the_picture(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    asked = ["generate", "a zorb", "--steps", "1", "--height", "64", "--width", "64", "--device", "cpu", "-o"]
    assert bitdance([*asked, str(tmp_path / "a"), "--lora", str(adapter)]) == 0
    assert bitdance([*asked, str(tmp_path / "b")]) == 0
    (one,), (other,) = (list((tmp_path / name).glob("0*.png")) for name in "ab")
    words, without = read_metadata(one), read_metadata(other)
    assert words["lora"] == "adapter" and words["lora_fingerprint"] == Adapter.read(adapter).fingerprint
    assert not any(key.startswith("lora") for key in without) and words["job_hash"] != without["job_hash"]
    again = ["generate", "--from", str(one), "--device", "cpu", "-o", str(tmp_path / "c")]
    assert bitdance(again) == 2 and "made with the adapter 'adapter'" in capsys.readouterr().err
    assert bitdance([*again, "--lora", str(adapter)]) == 0
    assert next((tmp_path / "c").glob("0*.png")).read_bytes() == one.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator__lora__targets": '["nowhere"]'}, "no linear layer is called 'nowhere'; there are backbone, head, q_proj"),
        ({"generator__lora__rank": "0"}, "generator.lora.rank = 0; a whole number from 1 to"),
        ({"generator__init": ""}, "name that model in generator.init"),
        ({"generator__freeze": '["head"]'}, "all but the adapter is frozen"),
        ({"generator__resolution_tokens": "500"}, "an adapter holds no new tokens"),
        ({"generator__head__time_shift": "2.0"}, "time_shift = 2.0 beside generator.lora"),
        ({"run__precision": "bfloat16-weights"}, "needs deepspeed.zero_stage 1, 2 or 3"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    place: Path, tmp_path: Path, capsys: Any, changes: dict[str, str], message: str
) -> None:
    assert stages.cli.train(settings(place, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_adapter_goes_to_its_own_base_alone(adapter: Path, merged: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    pipe = BitDancePipeline.from_pretrained(merged, device="cpu")
    with pytest.raises(ValueError, match=r"was trained on the model with fingerprint \w+ \('demo'\)"):
        pipe.load_lora_weights(adapter)
    assert same_weights(pipe.model, load_model(merged, device="cpu"))
    assert stages.cli.export([str(run), str(tmp_path / "out"), "--base", str(merged)]) == 2
    assert "has" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert stages.cli.export([str(merged), str(tmp_path / "out"), "--adapter"]) == 2
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        stages.engine.checkpoint.model_folder(run)
    with pytest.raises(FileNotFoundError, match="lacks adapter_config.json"):
        pipe.load_lora_weights(merged)


def test_an_adapter_of_another_shape_or_kind_is_refused(adapter: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    (copy / "bitdance.json").unlink()  # as other programs write it: no word of a base
    model = load_model("demo", device="cpu")
    Adapter.read(copy).add_to(model)
    model.head.net.res_blocks[0].attn.wo = torch.nn.Linear(256, 128)
    with pytest.raises(ValueError, match=r"head.net.res_blocks.0.attn.wo has shapes \[256, 4\] · \[4, 256\]"):
        Adapter.read(copy).add_to(model)
    write_json(read_json(copy / "adapter_config.json") | {"use_dora": True}, copy / "adapter_config.json")
    with pytest.raises(ValueError, match="use_dora = True; only plain LoRA is read"):
        Adapter.read(copy)


def test_an_untied_llm_is_adapted_the_same_with_and_without_its_text_output(adapter: Path, tmp_path: Path) -> None:
    """Loaded for pictures only, the LLM has another class, and the same names for adapters."""
    model = load_model("demo", device="cpu")
    config = {**model.backbone.lm.config.to_dict(), "tie_word_embeddings": False}
    untied = Backbone.from_config(config, torch.float32)
    model.backbone = untied
    save_model(model, tmp_path / "untied")
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_bytes((adapter / name).read_bytes())
    whole = load_model(tmp_path / "untied", device="cpu", lora=tmp_path / "adapter")
    less = load_model(tmp_path / "untied", device="cpu", lora=tmp_path / "adapter", generation_only=True)
    assert not less.backbone.has_output_head
    assert same_weights(whole.backbone.lm.base_model, less.backbone.lm.base_model)


def test_the_plan_counts_what_an_adapter_trains(capsys: Any) -> None:
    assert stages.cli.train([str(ROOT / "configs" / "14b" / "lora.toml"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    wide, inner, keys, r = 5120, 17408, 1024, 16
    layer = r * (2 * (wide + wide) + 2 * (wide + keys) + 3 * (wide + inner))
    head = 6 * r * ((5120 + 3 * 5120) + (5120 + 5120) + (5120 + 2 * 7680) + (7680 + 5120))
    trained = {name: part["trained"] for name, part in plan["parameters"].items() if part["trained"]}
    assert trained == {"backbone: layers": 40 * layer, "head": head}
    assert plan["columns"][0]["fits"]


def test_the_published_recipe_reads(tmp_path: Path) -> None:
    config = load_config(LORA)
    assert config.generator.lora is not None and config.generator.init == "demo"
    assert dataclasses.asdict(config)["generator"]["lora"]["rank"] == config.generator.lora.rank
