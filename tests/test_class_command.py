"""`bitdance generate --class`: real batches, names, JSONL, shards, resuming, making again; prompts and classes do not mix."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from class_model import golden_model, golden_tokenizer
from PIL import Image

from bitdance import load_pipeline
from bitdance.cli import main
from bitdance.folder.picture_model import PictureModel
from bitdance.jobs.job import Job
from bitdance.jobs.npz import write_npz
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.kinds.class_patch.pipeline import ClassPipeline
from bitdance.picture import read_metadata
from bitdance.sequence.classes import ClassEntry, ClassNames

pytestmark = pytest.mark.slow

NAMES = ClassNames(tuple(ClassEntry((name,)) for name in ("tench", "crane", "red fox", *(f"thing {i}" for i in range(3, 10)))))
TEXT_MODEL = str(Path(__file__).parent / "golden" / "t2i_ckpt")
FAST = ["--steps", "2", "--guidance", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "classes"
    LAYOUT.save(PictureModel(golden_model(16), golden_tokenizer(), NAMES), path)
    return path


@pytest.fixture
def batches(monkeypatch: Any) -> list[list[int]]:
    """The classes of each batch that the pipeline is called with."""
    seen: list[list[int]] = []
    original = ClassPipeline.generate

    def generate(self: ClassPipeline, classes: Any, *options: Any) -> Any:
        seen.append(classes)
        return original(self, classes, *options)

    monkeypatch.setattr(ClassPipeline, "generate", generate)
    return seen


def generate(folder: Path, out: Path, *arguments: str) -> int:
    return main(["generate", *arguments, *FAST, "--model", str(folder), "-o", str(out)])


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def test_numbers_and_names_become_one_batch_of_pictures(folder: Path, tmp_path: Path, batches: list[list[int]]) -> None:
    assert generate(folder, tmp_path, "--class", "2", "Crane", "--seed", "5", "6", "--grid") == 0
    assert batches == [[2, 2, 1, 1]]
    rows = manifest(tmp_path)
    assert [(row["class"], row["class_name"], row["seed"]) for row in rows] == [
        *((2, "red fox", 5), (2, "red fox", 6), (1, "crane", 5), (1, "crane", 6))
    ]
    assert "prompt" not in rows[0] and rows[0]["file"] == "0000-red-fox-5.png" and (tmp_path / "grid.png").is_file()
    expected = load_pipeline(folder, "cpu")("crane", seed=6, num_inference_steps=2, guidance_scale=2.0).images[0]
    assert Image.open(tmp_path / "0001-crane-6.png").tobytes() == expected.tobytes()
    found = read_metadata(tmp_path / "0001-crane-6.png")
    assert (found["class"], found["class_name"], found["height"], found["guidance"]) == (1, "crane", 64, 2.0)


def test_all_is_every_class_once_and_shards_share_them(folder: Path, tmp_path: Path, batches: list[list[int]]) -> None:
    assert generate(folder, tmp_path, "--class", "all", "--batch-size", "4", "--shard", "0/2") == 0
    assert generate(folder, tmp_path, "--class", "all", "--batch-size", "4", "--shard", "1/2") == 0
    assert sorted(label for batch in batches for label in batch) == list(range(10)) and len(batches) == 4
    assert generate(folder, tmp_path, "--class", "all", "--batch-size", "4") == 0
    assert len(batches) == 4, "what is there is not made again"


def test_jsonl_names_classes_beside_other_settings(folder: Path, tmp_path: Path) -> None:
    jobs = [{"class": 2, "n": 2}, {"class": "tench", "seed": 4, "guidance": 1, "id": "fish"}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    assert generate(folder, tmp_path / "out", "--prompts", str(tmp_path / "jobs.jsonl")) == 0
    rows = {row["file"]: (row["class"], row["seed"], row["guidance"]) for row in manifest(tmp_path / "out")}
    assert rows == {"0000-red-fox-0.png": (2, 0, 2), "0000-red-fox-1.png": (2, 1, 2), "fish-4.png": (0, 4, 1)}


def test_a_picture_is_made_again_from_itself(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert generate(folder, tmp_path / "a", "--class", "3", "--seed", "8", "--cfg-schedule", "constant") == 0
    picture = tmp_path / "a" / "0000-thing-3-8.png"
    again = ["generate", "--from", str(picture), "-o", str(tmp_path / "b"), "--device", "cpu"]
    assert main([*again, "--model", str(folder)]) == 0
    assert (tmp_path / "b" / picture.name).read_bytes() == picture.read_bytes()
    assert main(again) == 2 and "say where that is with --model DIR" in capsys.readouterr().err
    assert main([*again, "--model", "demo"]) == 2
    assert "this model makes pictures of prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a dog"], "prompt 1: this model makes pictures of classes; give --class N|NAME|all, no prompt"),
        (["a dog", "--class", "3"], "prompts come from one place"),
        (["--class", "3", "--prompts", "x.txt"], "prompts come from one place"),
        (["--class", "10"], "--class '10': class = 10; a whole number from 0 to 9 is allowed"),
        (["--class", "3", "thing"], "--class 'thing': unknown class 'thing'; nearest are"),
        (["--class", "3", "--height", "128"], "height 128 × width 64 is not supported: this model makes pictures of 64×64"),
        (["--class", "3", "--lora", "x"], "--lora is not for the kind of model"),
        (["--class", "3", "--quantize", "int8"], "--quantize is not for the kind of model"),
        (["--class", "3", "--cfg-schedule", "cosine"], "cfg_schedule = 'cosine'; allowed are linear, constant"),
        (["--class", "3", "--preset", "fast"], "preset = 'fast'; allowed are B-1x"),
        (["--class", "3", "3", "--seed", "1", "1"], "seed 1 is asked for twice"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(ClassPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert generate(folder, tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"class": 3, "prompt": "a dog"}', 'line 1: has both "prompt" and "class"'),
        ('{"class": null}', "line 1: class = None; a number or a name is allowed"),
        ('{"class": true}', "line 1: class = True; a whole number from 0 to 9 is allowed"),
        ('{"class": [1]}', "line 1: class = [1]"),
        ('{"prompt": "a dog"}', "line 1: this model makes pictures of classes"),
        ('{"seed": 1}', 'line 1: has no "prompt"; only this key is required (of a class model "class")'),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(folder: Path, tmp_path: Path, capsys: Any, line: str, words: str) -> None:
    (tmp_path / "jobs.jsonl").write_text(line + "\n")
    assert generate(folder, tmp_path / "out", "--prompts", str(tmp_path / "jobs.jsonl")) == 2
    assert words in capsys.readouterr().err


def test_a_text_model_refuses_classes(tmp_path: Path, capsys: Any) -> None:
    for arguments, words in (
        (["--class", "3"], "--class '3': this model makes pictures of prompts; a class needs a class model (--model)"),
        (["x", "--cfg-schedule", "linear"], "--cfg-schedule is not for the kind of model"),
    ):
        assert main(["generate", *arguments, "--model", TEXT_MODEL, "-o", str(tmp_path / "o"), "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err


def test_all_pictures_become_one_shuffled_npz(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--class", "all", "--images-per-prompt", "2", "--npz"]
    assert generate(folder, tmp_path, *arguments) == 0
    found = np.load(tmp_path / "samples.npz", allow_pickle=False)
    assert found["arr_0"].shape == (20, 64, 64, 3) and found["arr_0"].dtype == np.uint8
    assert sorted(found["arr_1"].tolist()) == sorted([*range(10)] * 2) and found["arr_1"].tolist() != sorted(found["arr_1"])
    known = {Image.open(tmp_path / row["file"]).tobytes(): row["class"] for row in manifest(tmp_path)}
    assert [known[picture.tobytes()] for picture in found["arr_0"]] == found["arr_1"].tolist()
    first = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").unlink()
    (tmp_path / manifest(tmp_path)[3]["file"]).unlink()
    assert generate(folder, tmp_path, *arguments) == 0  # the missing one is made again
    assert (tmp_path / "samples.npz").read_bytes() == first


def test_an_npz_that_cannot_be_is_refused_before_anything_is_made(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert generate(folder, tmp_path / "a", "--class", "all", "--npz", "--shard", "0/2") == 2
    assert "it holds all pictures; run once more without --shard" in capsys.readouterr().err
    monkeypatch.setattr("lfq_tokenizer.files._free", lambda target: 1000)
    assert generate(folder, tmp_path / "b", "--class", "all", "--npz") != 0
    assert "make room first" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_set_with_gaps_is_no_set(tmp_path: Path) -> None:
    jobs = [Job(i, f"{i}.png", "", i, 8, 8, 1, 1.0, i, "x") for i in range(3)]
    for job in jobs[:2]:
        Image.new("RGB", (8, 8)).save(tmp_path / job.file)
    with pytest.raises(ValueError, match="1 of 3 pictures are missing, 2.png first"):
        write_npz(jobs, tmp_path)
    assert not (tmp_path / "samples.npz").exists()


def test_classes_at_random_are_always_the_same(folder: Path, tmp_path: Path) -> None:
    for out in ("one", "other"):
        assert generate(folder, tmp_path / out, "--class", "random:6", "--steps", "1") == 0
    rows, again = manifest(tmp_path / "one"), manifest(tmp_path / "other")
    assert [row["seed"] for row in rows] == list(range(6)) and len({row["class"] for row in rows}) > 1
    assert [(row["file"], row["class"]) for row in rows] == [(row["file"], row["class"]) for row in again]
