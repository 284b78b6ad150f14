"""`load_pipeline` for class-conditional models: labels, settings, pictures, tokens, cancelling, folders, `info`, `verify`."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from class_model import golden_model, golden_tokenizer

import bitdance.generator
from bitdance import BitDancePipeline, load_pipeline
from bitdance.cli import main
from bitdance.costs import picture_model as costs
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.class_patch.costs import COSTS
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.kinds.class_patch.pipeline import ClassPipeline
from bitdance.sequence.classes import ClassEntry, ClassNames
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors, write_safetensors

pytestmark = pytest.mark.slow

ENTRIES = [("tench", "Tinca tinca"), ("crane",), ("red fox", "Vulpes"), ("golden retriever",), ("crane", "tower crane")]
ENTRIES += [(f"thing {i}",) for i in range(5, 10)]
NAMES = ClassNames(tuple(ClassEntry(names, f"n{i:08d}") for i, names in enumerate(ENTRIES)))
TEXT_MODEL = str(Path(__file__).parent / "golden" / "t2i_ckpt")
FAST = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "classes"
    defaults = {"guidance_scale": 2.0, "num_inference_steps": 2, "cfg_schedule": "constant"}
    LAYOUT.save(PictureModel(golden_model(16), golden_tokenizer(), NAMES, {"defaults": defaults}), path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ClassPipeline:
    return load_pipeline(folder, "cpu")


def test_the_kind_is_told_by_the_folder(folder: Path, pipe: ClassPipeline) -> None:
    assert pipe.kind == "class_patch" and isinstance(pipe, ClassPipeline)
    demo = load_pipeline("demo", "cpu")
    assert demo.kind == "next_patch" and isinstance(demo, BitDancePipeline)


def test_labels_are_numbers_names_and_wordnet_ids(pipe: ClassPipeline) -> None:
    out = pipe([3, "Golden  RETRIEVER", "n00000003", "tinca_tinca", "5"], seed=[1, 1, 1, 2, 3], output_type="tokens", **FAST)
    assert out.classes == [3, 3, 3, 0, 5] and out.images is None
    assert torch.equal(out.tokens[0], out.tokens[1]) and torch.equal(out.tokens[0], out.tokens[2])
    assert out.tokens.shape == (5, 8, 8, 8) and bool((out.tokens.abs() == 1).all())
    one = pipe(class_label=0, seed=2, output_type="tokens", **FAST)
    assert torch.equal(one.tokens[0], out.tokens[3])


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (10, "class = 10; a whole number from 0 to 9 is allowed"),
        (-1, "class = -1"),
        (True, "class = True"),
        (1.5, "class = 1.5"),
        ("12", "class = 12"),
        ("golden retreiver", "unknown class 'golden retreiver'; nearest are golden retriever"),
        ("crane", "name of several: 1 (crane); 4 (crane, tower crane); give the number"),
        ([], "empty list"),
        ([3, None], "class = None"),
        (None, "give class_label"),
    ],
)
def test_a_label_of_no_class_is_refused_with_what_is_allowed(pipe: ClassPipeline, label: Any, words: str) -> None:
    with pytest.raises(ValueError, match="^") as error:
        pipe(label)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "a dog"}, "and no prompt"),
        ({"height": 128}, "height = 128; this model makes pictures of 64×64 pixels only"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"cfg_schedule": "x"}, "cfg_schedule = 'x'"),
        ({"preset": "fast"}, "preset = 'fast'; allowed are B-1x"),
        ({"sampler": "x"}, "sampler = 'x'"),
        ({"output_type": "jpeg"}, "output_type = 'jpeg'"),
        ({"callback_on_step_end": 3}, "must be a function"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(pipe: ClassPipeline, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:
        pipe(3, **arguments)
    assert words in str(error.value)


def test_the_folders_defaults_hold_unless_something_is_said(pipe: ClassPipeline) -> None:
    said = pipe(3, seed=1, output_type="tokens", num_inference_steps=2, guidance_scale=2.0, cfg_schedule="constant")
    assert torch.equal(pipe(3, seed=1, output_type="tokens").tokens, said.tokens)
    other = pipe(3, seed=1, output_type="tokens", cfg_schedule="linear")
    assert not torch.equal(other.tokens, said.tokens)


def test_several_pictures_of_a_class_have_seeds_that_count_up(pipe: ClassPipeline) -> None:
    out = pipe(["tench", 3], num_images_per_class=2, seed=7, height=64, width=64, **FAST)
    assert out.classes == [0, 0, 3, 3] and out.seeds == [7, 8, 9, 10]
    assert [picture.size for picture in out.images] == [(64, 64)] * 4
    assert torch.equal(pipe(3, seed=10, **FAST).tokens[0], out.tokens[3])


def test_tokens_and_pictures_turn_into_each_other(pipe: ClassPipeline) -> None:
    out = pipe([3, 0], seed=1, **FAST)
    again = pipe.decode(out.tokens)
    assert [np.array(a).tolist() for a in again] == [np.array(b).tolist() for b in out.images]
    forms = {form: pipe.encode(pipe.decode(out.tokens, output_type=form)) for form in ("pil", "np", "pt")}
    assert forms["pt"].shape == out.tokens.shape and torch.equal(forms["np"], forms["pt"])
    assert (forms["pil"] == forms["pt"]).float().mean() > 0.9  # pixels of 8 bits
    assert torch.equal(pipe.encode(out.images[0])[0], forms["pil"][0])
    with pytest.raises(ValueError, match="images are a str"):
        pipe.encode("picture.png")
    with pytest.raises(ValueError, match="tokens are list"):
        pipe.decode([1])


def test_the_text_pipeline_turns_tokens_and_pictures_into_each_other_too() -> None:
    demo = load_pipeline("demo", "cpu")
    out = demo("a red circle", height=64, width=64, num_inference_steps=1, guidance_scale=1, seed=1)
    assert torch.equal(out.tokens, out.bits)
    assert np.array_equal(np.array(demo.decode(out.tokens)[0]), np.array(out.images[0]))
    assert demo.encode(out.images).shape == out.tokens.shape


def test_a_callback_sees_every_block_and_may_cancel_a_picture(pipe: ClassPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def callback(own: ClassPipeline, step: int, t: float, values: dict[str, Any]) -> None:
        seen.append((step, t))
        assert own is pipe and values["tokens"].shape == (2, 8, 8, 8)
        if step == 0:
            own.cancel(1)

    out = pipe([3, 0], seed=5, callback_on_step_end=callback, **FAST)
    assert seen == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)]
    assert torch.equal(out.tokens[0], pipe(3, seed=5, **FAST).tokens[0])
    assert not out.tokens[1, :, 4:].any() and bool(out.tokens[1, :, :4, :4].all())
    assert bool(pipe([3, 0], seed=5, output_type="tokens", **FAST).tokens.all()), "the next call begins anew"


def test_saving_and_loading_return_every_tensor(folder: Path, pipe: ClassPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    for name in ("class_patch.safetensors", "ae.safetensors"):
        one, two = (read_safetensors(place / name) for place in (folder, tmp_path / "copy"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for name in ("bitdance.json", "class_patch.json", "classes.json", "ae_config.json"):
        assert read_json(folder / name) == read_json(tmp_path / "copy" / name)
    with pytest.raises(ValueError, match="not an empty folder"):
        pipe.save_pretrained(tmp_path / "copy")
    small = load_pipeline(folder, "cpu", generation_only=True)
    with pytest.raises(ValueError, match="without its picture encoder"):
        small.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="without its picture encoder"):
        small.encode(torch.zeros(1, 3, 64, 64))


def spoiled(folder: Path, target: Path, name: str, change: Any) -> Path:
    """A copy of a model folder with one JSON file changed; None removes it."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if change is None:
        (target / name).unlink()
    else:
        write_json(change(read_json(target / name)), target / name)
    return target


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bitdance.json", lambda d: d | {"kind": "next_scroll"}, "\"kind\" = 'next_scroll'; known are next_patch, class_patch"),
        ("bitdance.json", lambda d: d | {"kind": 3}, '"kind" = 3'),
        ("bitdance.json", lambda d: d | {"defaults": {"guidance_scale": "x"}}, "guidance = 'x'"),
        ("bitdance.json", lambda d: d | {"defaults": 3}, '"defaults" is a int'),
        ("class_patch.json", None, "class_patch.json is missing"),
        ("class_patch.json", lambda d: d | {"num_classes": 11}, "cls_embedding.weight has shape [11, 128], expected [12, 128]"),
        ("class_patch.json", lambda d: d | {"colour": 1}, "unknown keys ['colour']"),
        (
            "ae_config.json",
            lambda d: d | {"ddconfig": d["ddconfig"] | {"z_channels": 4}},
            "tokens of 8 bits, but of 4 bits in ae_config.json",
        ),
        ("classes.json", lambda d: {k: v for k, v in d.items() if k != "4"}, "classes 4 are missing; every class from 0 to 9"),
        ("classes.json", lambda d: d | {"10": "more"}, "11 classes, and the model has 10"),
        ("classes.json", lambda d: d | {"x": "more"}, "key 'x' is no class number"),
        ("classes.json", lambda d: d | {"3": {"name": "dog"}}, "class 3: unknown keys ['name']; known are names, wordnet_id"),
        ("classes.json", lambda d: d | {"3": []}, "class 3: []; give a name"),
        ("classes.json", lambda d: d | {"3": {"names": "a", "wordnet_id": "3"}}, "class 3: wordnet_id = '3'"),
        ("classes.json", lambda d: 3, "classes.json: a int; expected an object"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_file(folder: Path, tmp_path: Path, name: str, change: Any, words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pipeline(spoiled(folder, tmp_path / "m", name, change), "cpu")
    assert words in str(error.value)


def test_without_classes_json_names_are_numbers(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(spoiled(folder, tmp_path / "m", "classes.json", None), "cpu")
    assert pipe.names.name(3) == "3" and pipe.names.number("3") == 3


def test_text_commands_and_classes_refuse_each_others_folders(folder: Path) -> None:
    with pytest.raises(ValueError, match="a model of kind 'class_patch', not 'next_patch'; bitdance.load_pipeline"):
        BitDancePipeline.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no model folder 'nowhere'"):
        load_pipeline("nowhere")


def test_nothing_outside_the_registry_asks_for_a_kind() -> None:
    """`if kind == …` is for the registry; elsewhere a kind's own package does what is special to it."""
    import re

    root = Path(bitdance.generator.__file__).parent
    shared = [path for path in root.rglob("*.py") if "kinds" not in path.relative_to(root).parts]
    kinds = "|".join(bitdance.generator.KINDS)
    asked = re.compile(r"""\bkind\s*(==|!=|in)\s*["'(\[]\s*["']?(""" + kinds + ")")
    imported = re.compile(r"^\s*(from|import) bitdance\.kinds", re.MULTILINE)
    texts = {path.name: path.read_text("utf-8") for path in shared}
    assert [name for name, text in texts.items() if asked.search(text) or imported.search(text)] == []
    assert asked.search('if kind == "class_patch":') and imported.search("from bitdance.kinds.class_patch import facts")


def test_info_tells_what_the_folder_holds(folder: Path, capsys: Any) -> None:
    assert main(["info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "class_patch" and found["class_count"] == 10 and found["sizes"] == [[64, 64]]
    assert found["classes"]["0"] == "tench, Tinca tinca"
    assert main(["sizes", str(folder)]) == 0 and capsys.readouterr().out == "64×64 (default)\n"
    assert main(["sizes", str(folder), "--json"]) == 0 and json.loads(capsys.readouterr().out)["only_these"] is True
    assert found["parameters"] == sum(found["parts"].values()) > 0


def test_commands_for_text_models_refuse_the_folder_by_its_kind(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for command, option in (
        ("bench", "--yardstick"),
        ("bench", "--no-compile"),
        ("doctor", "--offload"),
        ("doctor", "--measure"),
    ):
        assert main([command, "--model", str(folder), option]) == 2
        assert f"{option} is for text models of BitDance; leave it out for this one" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "o"), "--format", "diffusers"]) == 2
    assert "--format is not for a model of this kind (class_patch)" in capsys.readouterr().err


def test_bench_times_the_phases_and_counts_every_operation(folder: Path, capsys: Any) -> None:
    """The operations of a picture are those that the plain layers ask for, though the pipeline's own are hidden from torch."""
    options = ["--batch", "1", "2", "--repeats", "1", "--dtype", "float32", "--preset", "own"]
    assert main(["bench", "--model", str(folder), *options, "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)["runs"]
    assert (one["batch"], two["batch"], one["steps"], one["guidance"]) == (1, 2, 2, 2.0)
    assert two["flops"] == 2 * one["flops"] and set(one["seconds"]) == {"tokens", "decode", "png"}
    network = sum(p.numel() for name, p in golden_model(16).named_parameters() if p.ndim == 2 and "head" not in name)
    assert one["flops"] > 2 * 2 * network  # two branches pass every matrix at least once
    assert one["images_per_s"] == pytest.approx(1 / sum(one["seconds"].values()))
    assert main(["bench", "--model", str(folder), *options]) == 0
    assert "float32, own: 2 steps, guidance 2" in capsys.readouterr().out


def test_doctor_says_what_a_batch_takes(folder: Path, capsys: Any) -> None:
    assert main(["doctor", "--model", str(folder), "--batch-size", "3", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["height"], found["fits"]) == (3, 64, True)
    checked, width = LAYOUT.check(folder), 4 if found["dtype"] == "float32" else 2
    program = found["phases"][found["phase"]]["program"]
    assert found["needs_bytes"] - program == COSTS.needed(checked, 3, width, guided=True)


def test_half_precision_makes_pictures(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # processors without the instructions are slow
        pipe = load_pipeline(folder, "cpu", "bfloat16")
    assert pipe.dtype == torch.bfloat16
    out = pipe([3, 0], seed=1, **FAST)
    assert out.tokens.dtype == torch.float32 and bool((out.tokens.abs() == 1).all())
    assert pipe.to("float32").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        load_pipeline(folder, "cpu", "int8")


def test_verify_finds_a_sound_folder_sound_and_a_broken_number(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["verify", str(folder), "--json"]) == 0
    sound = json.loads(capsys.readouterr().out)
    assert sound["problems"] == [] and set(sound["parts"]) == {"generator", "tokenizer"} and len(sound["files"]) == 6
    copy = spoiled(folder, tmp_path / "m", "classes.json", lambda d: d)
    state = read_safetensors(copy / "class_patch.safetensors")
    state["norm.weight"][3] = float("nan")
    write_safetensors(state, copy / "class_patch.safetensors")
    assert main(["verify", str(copy), "--json"]) == 1
    broken = json.loads(capsys.readouterr().out)
    assert "norm.weight (1 of 32)" in broken["problems"][0]
    assert broken["fingerprint"] != sound["fingerprint"]
    (copy / "class_patch.safetensors").write_bytes(b"x")
    assert main(["verify", str(copy)]) in (1, 2)
    capsys.readouterr()
    assert main(["verify", str(folder), "--against", TEXT_MODEL]) == 2
    assert "of kind next_patch" in capsys.readouterr().err
    assert main(["verify", str(folder), "--dtype", "bfloat16"]) == 2
    assert "not 'next_patch'" in capsys.readouterr().err


def test_two_folders_are_compared_tensor_by_tensor(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["verify", str(folder), "--against", str(folder), "--tolerance", "0", "--json"]) == 0
    capsys.readouterr()
    copy = spoiled(folder, tmp_path / "m", "classes.json", lambda d: d | {"3": "cat"})
    state = read_safetensors(copy / "class_patch.safetensors")
    state["norm.weight"] += 1
    write_safetensors(state, copy / "class_patch.safetensors")
    assert main(["verify", str(folder), "--against", str(copy), "--tolerance", "0.5", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == ["1 tensors are more than 0.5 apart: generator norm.weight"]
    assert found["difference"]["configs"]["classes.json 3"] == [None, "cat"]


def test_what_does_not_fit_into_the_memory_is_refused_before_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = LAYOUT.check(folder)
    one, eight = (COSTS.needed(found, batch, 4, True) for batch in (1, 800))
    assert one < eight
    command = ["generate", "--class", "all", "--images-per-prompt", "80", "--model", str(folder), "-o", str(tmp_path / "o")]
    command += ["--batch-size", "800", "--device", "cpu"]
    monkeypatch.setattr(costs, "free_bytes", lambda device: (one + eight) // 2)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "needs about" in said and "add --batch-size" in said
    monkeypatch.setattr(costs, "free_bytes", lambda device: 10)
    assert main(command) == 2
    assert "use a machine with more memory" in capsys.readouterr().err
