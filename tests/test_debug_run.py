"""The whole way on a few tiny drawings: pack, tokenizer, bits, generator, stop and go on, export, pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import stages.cli
from bitdance import BitDancePipeline
from bitdance.cli import main as bitdance
from bitdance.picture import to_pil
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.weights import read_safetensors
from stages.data.cli import main as data
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import step_folder, verify

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parent.parent / "configs" / "debug"
COLOURS = ("red", "green", "blue", "black")
SHAPES = ("circle", "square", "line")
PROMPT = "a red circle"


def draw(folder: Path) -> None:
    """Twelve pictures of 20 × 20 pixels, each with a caption file."""
    folder.mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            picture = Image.new("RGB", (20, 20), "white")
            pen = ImageDraw.Draw(picture)
            if shape == "circle":
                pen.ellipse((3, 3, 16, 16), fill=colour)
            elif shape == "square":
                pen.rectangle((4, 4, 15, 15), fill=colour)
            else:
                pen.line((0, 0, 19, 19), fill=colour, width=3)
            picture.save(folder / f"{colour}-{shape}.png")
            (folder / f"{colour}-{shape}.txt").write_text(f"a {colour} {shape}\nthe {shape}, {colour}\n")


def train(name: str, out: Path, shards: Path, *changes: str) -> int:
    settings = [f"run.out={out}", f"data.train={json.dumps([str(shards)])}", *changes]
    return stages.cli.train([str(CONFIGS / f"{name}.toml"), *(part for s in settings for part in ("--set", s))])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything is made once; the tests look at it."""
    place = tmp_path_factory.mktemp("debug")
    draw(place / "drawings")
    assert data(["pack", "folder", str(place / "shards"), str(place / "drawings"), "--size", "16"]) == 0
    assert train("tokenizer", place / "tokenizer", place / "shards") == 0
    assert stages.cli.tokenizer(["encode", str(place / "shards"), str(place / "bits"), "--model", str(place / "tokenizer")]) == 0
    generator = (f"generator.tokenizer={place / 'tokenizer'}", f"data.heldout={json.dumps([str(place / 'bits')])}")
    assert train("generator", place / "whole", place / "bits", *generator) == 0
    assert train("generator", place / "parts", place / "bits", *generator, "run.steps=2") == 0
    assert train("generator", place / "parts", place / "bits", *generator) == 0
    for dtype in ("float32", "bfloat16"):
        assert stages.cli.export([str(place / "whole"), str(place / dtype), "--dtype", dtype]) == 0
    return place


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def bits(folder: Path) -> torch.Tensor:
    pipe = BitDancePipeline.from_pretrained(folder, device="cpu", dtype="float32")
    out = pipe([PROMPT, "the line, blue"], num_inference_steps=3, guidance_scale=2.0, seed=5, output_type="bits")
    return out.bits


def test_the_tokenizer_run_reports_and_keeps_what_it_says(place: Path) -> None:
    run = place / "tokenizer"
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    judged = [row for row in rows(run) if "heldout/psnr" in row]
    assert [row["step"] for row in judged] == [3, 6] and all(0 < row["heldout/psnr"] < 60 for row in judged)
    assert {p.name for p in run.glob("step_*")} == {"step_00000003", "step_00000006"}
    assert verify(step_folder(run, 6)) == 6
    assert (run / "samples" / "grid_00000006.png").is_file() and json.loads((run / "config.json").read_text())


def test_a_tokenizer_can_be_judged_from_its_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(place / "shards"), "--model", str(place / "tokenizer"), "--json"]
    assert stages.cli.tokenizer([*arguments, "--picture", str(place / "eval.png")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pictures"] == 12 and figures.keys() >= {"psnr", "bit_entropy", "dead_bits"}
    assert figures["psnr"] == pytest.approx(rows(place / "tokenizer")[-1]["heldout/psnr"], rel=1e-5)
    assert Image.open(place / "eval.png").size == (8 * 16, 2 * 16)


def test_encoded_shards_hold_the_bits_of_the_pictures_and_their_captions(place: Path) -> None:
    tokenizer = LFQTokenizer.from_pretrained(step_folder(place / "tokenizer", 6) / "model")
    pictures, encoded = (ShardDataset(ShardIndex.open(place / name)) for name in ("shards", "bits"))
    assert len(pictures) == len(encoded) == 12
    from stages.recipes.tokenizer.feed import as_images

    for i in range(12):
        before, after = pictures[i], encoded[i]
        assert after.picture is None and after.bits_Chw is not None and after.bits_Chw.shape == (8, 8, 8)
        assert (after.key, after.captions, after.attributes) == (before.key, before.captions, before.attributes)
        with torch.no_grad():
            assert torch.equal(after.bits_Chw, tokenizer.encode(as_images([before.picture]))[0].to(torch.int8))


def test_four_steps_of_the_generator_equal_two_and_two(place: Path) -> None:
    whole, parts = (step_folder(place / name, 4) for name in ("whole", "parts"))
    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors"))
    expected = {"resume/learner_00000.safetensors", "model/model.safetensors", "model/vision_head.safetensors"}
    assert expected <= {f.as_posix() for f in files}
    for file in files:
        first, second = read_safetensors(whole / file), read_safetensors(parts / file)
        assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    keys = ("loss", "vision", "text", "lr", "grad_norm")
    for name in keys:
        one, two = ([row[name] for row in rows(place / run) if "loss" in row] for run in ("whole", "parts"))
        assert one == two and len(one) == 4
    assert {"heldout/vision", "heldout/text"} < rows(place / "whole")[-1].keys()


def test_the_tokenizer_inside_a_generator_is_the_frozen_one(place: Path) -> None:
    trained = read_safetensors(step_folder(place / "tokenizer", 6) / "model" / "ae.safetensors")
    inside = read_safetensors(place / "float32" / "ae.safetensors")
    assert list(trained) == list(inside) and all(torch.equal(trained[name], inside[name]) for name in trained)


def test_the_bits_before_export_equal_those_after(place: Path) -> None:
    before = bits(step_folder(place / "whole", 4) / "model")
    assert before.shape == (2, 8, 8, 8)
    assert torch.equal(bits(place / "float32"), before)


def test_an_export_has_the_dtype_that_was_asked_for_and_names_no_place(place: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        for path in (place / dtype).glob("*.safetensors"):
            assert {str(t.dtype) for t in read_safetensors(path).values()} == {f"torch.{dtype}"}, path.name
        assert [p.name for p in (place / dtype).iterdir() if str(place).encode() in p.read_bytes()] == []
    extras = json.loads((place / "float32" / "bitdance.json").read_text())
    assert extras["sizes"] == [[16, 16]] and extras["defaults"]["num_inference_steps"] == 4
    assert stages.cli.export([str(place / "whole"), str(place / "float32")]) == 2  # nothing is overwritten


def test_the_exported_model_makes_pictures(place: Path, tmp_path: Path) -> None:
    command = ["generate", PROMPT, "a blue square", "--model", str(place / "bfloat16"), "-o", str(tmp_path), "--device", "cpu"]
    assert bitdance([*command, "--seed", "1", "--steps", "2"]) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 2 and all(Image.open(p).size == (16, 16) for p in pictures)
    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in manifest] == [PROMPT, "a blue square"]


def test_an_exported_tokenizer_is_the_trained_one(place: Path, tmp_path: Path) -> None:
    assert stages.cli.export([str(step_folder(place / "tokenizer", 3)), str(tmp_path / "t")]) == 0
    trained = read_safetensors(step_folder(place / "tokenizer", 3) / "model" / "ae.safetensors")
    exported = read_safetensors(tmp_path / "t" / "ae.safetensors")
    assert all(torch.equal(trained[name], exported[name]) for name in trained)


def test_a_dry_run_builds_everything_and_trains_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", f"data.train={json.dumps([str(place / 'shards')])}", "--set", f"run.out={place / 'never'}"]
    assert stages.cli.train([str(CONFIGS / "tokenizer.toml"), *changes, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["samples"] == 12 and plan["parameters"]["tokenizer"]["all"] > 10_000
    assert not (place / "never").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.stepz=3"], "did you mean run.steps?"),
        (["data.train=['nowhere/*.tar']"], "nowhere"),
        (["tokenizer.groups=3"], "groups = 3 for 8 bits"),
        (["tokenizer.init=nowhere"], "nowhere"),
        (["data.crop=64"], "data.crop = 64 is larger than the pictures"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_and_exit_code_2(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    assert train("tokenizer", tmp_path / "run", place / "shards", *changes) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and shown[-1].startswith("bitdance train: error:")
    assert checkpoint_free(tmp_path / "run")


def checkpoint_free(run: Path) -> bool:
    return not list(run.glob("step_*"))


def test_a_missing_resume_path_is_exit_code_2_and_trains_nothing(place: Path, tmp_path: Path) -> None:
    changes = ["--set", f"data.train={json.dumps([str(place / 'shards')])}", "--set", f"run.out={tmp_path / 'run'}"]
    assert stages.cli.train([str(CONFIGS / "tokenizer.toml"), *changes, "--resume", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "run").exists()


def test_decoded_shards_are_the_pictures_that_the_tokenizer_makes(place: Path, tmp_path: Path) -> None:
    assert stages.cli.tokenizer(["decode", str(place / "bits"), str(tmp_path / "out"), "--model", str(place / "float32")]) == 0
    data = ShardDataset(ShardIndex.open(place / "bits"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{data[i].key}.png" for i in range(12)}
    tokenizer = LFQTokenizer.from_pretrained(place / "float32")
    with torch.no_grad():
        expected = to_pil(tokenizer.decode(data[3].bits_Chw[None].float()))[0]
    assert Image.open(tmp_path / "out" / f"{data[3].key}.png").tobytes() == expected.tobytes()
    assert stages.cli.tokenizer(["decode", str(place / "shards"), str(tmp_path / "no"), "--model", str(place / "float32")]) == 2


def test_a_decoder_trained_later_changes_pictures_and_no_bit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = ("tokenizer.freeze_encoder=true", f'tokenizer.init="{place / "tokenizer"}"')
    assert train("tokenizer", tmp_path / "later", place / "shards", *later) == 0
    export = ["--decoder", str(tmp_path / "later")]
    assert stages.cli.export([str(place / "whole"), str(tmp_path / "new"), *export]) == 0
    old, new = (read_safetensors(folder / "ae.safetensors") for folder in (place / "float32", tmp_path / "new"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert torch.equal(bits(tmp_path / "new"), bits(place / "float32"))

    assert train("tokenizer", tmp_path / "other", place / "shards", later[1]) == 0  # its encoder moved on
    assert stages.cli.export([str(place / "whole"), str(tmp_path / "bad"), "--decoder", str(tmp_path / "other")]) == 2
    assert "freeze_encoder" in capsys.readouterr().err and not (tmp_path / "bad").exists()
    assert train("tokenizer", tmp_path / "none", place / "shards", later[0]) == 2  # nothing to freeze
