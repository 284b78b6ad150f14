"""One sample that cannot be read costs one sample: at the start, in every step, in a checkpoint's card, under distillation."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_files import picture_bytes, write_samples
from test_distill_targets import some
from test_generator_recipe import config, place, tensors  # noqa: F401 (a fixture)

from bitdance.folder.sizes import SizeRule
from distill import samples as distill_samples
from distill.samples import Samples
from distill.targets import check_targets
from lfq_tokenizer.json_file import read_json
from stages.data.buckets import Buckets
from stages.data.mixture import Mixture, Source
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.shards import ShardDataset, ShardIndex
from stages.data.skipping import NAMED, name_skipped
from stages.data.summary import summarise
from stages.engine.loader import micro_batches
from stages.measure.prompts import Gallery
from stages.recipes.generator import build_recipe
from stages.recipes.generator.recipe import GeneratorRecipe, texts

GOOD = 12


def png(value: int) -> bytes:
    return picture_bytes(Image.new("RGB", (16, 16), (20 * value % 256, 99, 7)))


BROKEN: dict[str, tuple[dict[str, bytes], str]] = {
    "page": ({"png": b"<html>404</html>", "txt": b"x"}, "picture format"),
    "cut": ({"png": png(3)[:60], "txt": b"x"}, "picture truncated"),
    "utf16": ({"png": png(3), "txt": "a fox".encode("utf-16")}, "captions are not UTF-8"),
    "half": ({"png": png(3), "json": b'{"caption": "a \\ud83d"}'}, "caption is no valid text"),
    "blank": ({"png": png(3), "txt": b" \r "}, "no caption"),
    "no\x1b[2Jjson": ({"png": png(3), "json": b"{" * 5}, "caption unreadable"),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Broken samples before, between and behind good ones."""
    texts = [json.dumps({"caption": f"dot {n}", "concept": [n]}).encode() for n in range(GOOD)]
    good = {f"g{n:02d}": {"png": png(n), "json": text} for n, text in enumerate(texts)}
    names, broken = list(good), list(BROKEN)
    order = [*broken[:2], *names[:6], *broken[2:4], *names[6:], *broken[4:]]
    (tmp_path / "odd").mkdir()
    write_samples(tmp_path / "odd" / "a.tar", {key: good[key] if key in good else BROKEN[key][0] for key in order})
    return tmp_path / "odd"


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.data.skipping._named", set())


def recipe(place: Path, shards: Path, **changes: Any) -> GeneratorRecipe:  # noqa: F811
    settings = {"mix": {}, "train": (str(shards),), "heldout": (str(shards),), "defaults": {"num_inference_steps": 1}}
    return build_recipe(config(place, **settings | changes))


def named(errors: str) -> Counter[str]:
    """How often each sample is named."""
    lines = [line for line in errors.splitlines() if "skipped sample " in line]
    return Counter(line.split("skipped sample ")[1].split(" in a.tar")[0] for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_starts_steps_and_names_each_broken_sample_once(
    place: Path,  # noqa: F811
    shards: Path,
    workers: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = recipe(place, shards, batch_size=9, steps=6, workers=workers)
    skipped: Counter[str] = Counter()
    for micro in micro_batches(run.feed, run.config.run, 0):
        assert all(name.startswith("g") for name in micro.samples)
        skipped.update(micro.skipped)
    assert skipped.keys() == {reason for _, reason in BROKEN.values()}
    errors = capfd.readouterr().err
    assert named(errors) == dict.fromkeys((key.replace("\x1b", "\\x1b") for key in BROKEN), 1) and "\x1b" not in errors


def test_what_an_index_holds_depends_on_the_data_alone(place: Path, shards: Path) -> None:  # noqa: F811
    first, second = recipe(place, shards), recipe(place, shards)
    generator = torch.Generator()
    early = [first.feed.batch(range(index, index + 4), generator) for index in range(0, 40, 4)]
    late = second.feed.batch(range(36, 40), generator)
    assert late.samples == early[-1].samples
    assert all(torch.equal(a, b) for a, b in zip(tensors(late.batch).values(), tensors(early[-1].batch).values(), strict=True))


def test_checkpoints_grids_and_held_out_losses_leave_broken_samples_out(
    place: Path,  # noqa: F811
    shards: Path,
    tmp_path: Path,
) -> None:
    run = recipe(place, shards)
    assert {text for text in texts(run.sources, run.training) if text != "x"} == {f"dot {n}" for n in range(GOOD)}
    run.save_model(run.module, tmp_path / "model", 1)
    card = read_json(tmp_path / "model" / "bitdance.json")
    assert [text for text in card["prompts"] if text != "x"] == [f"dot {n}" for n in range(GOOD)]
    assert card["sizes"] == [[16, 16]]
    assert np.isfinite(run.validate(run.module)["vision"])
    assert run.sample(run.module).size == (3 * 16 + 2 * 4, 3 * 16 + 2 * 4)  # eight pictures of the first readable captions


def test_a_run_of_nothing_but_broken_samples_says_so(place: Path, tmp_path: Path) -> None:  # noqa: F811
    path = write_samples(tmp_path / "a.tar", {key: members for key, (members, _) in BROKEN.items() if key != "cut"})
    with pytest.raises(ValueError, match="none of the first 5 samples can be read; see `bitdance data inspect`"):
        recipe(place, path)


def test_inspecting_finds_and_counts_them(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise(ShardIndex.open(shards), examples=18)
    assert summary["unreadable"] == Counter(reason for _, reason in BROKEN.values())
    assert summary["captions"] == GOOD + 1  # of the cut picture the header is whole
    assert [example["key"] for example in summary["examples"]] == [f"g{n:02d}" for n in range(GOOD)]
    assert set(named(capsys.readouterr().err).values()) == {1}


def test_a_flood_of_names_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2 * NAMED):
        name_skipped({f"sample {number}": "x"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == NAMED + 1 and "counted and not named" in lines[-1]


def test_the_teachers_pictures_are_made_for_the_samples_that_can_be_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(teacher: Any, captions: list[str], h: int, w: int, *_: Any) -> torch.Tensor:
        return torch.ones(len(captions), 8, h, w)

    monkeypatch.setattr(distill_samples, "generate_bits", made)
    source = Source(ShardDataset(ShardIndex.open(shards)))
    buckets = Buckets(SizeRule(4, 2, frozenset({1, 2, 3, 4})), ())
    desk: Any = SimpleNamespace(
        teacher=SimpleNamespace(extras={}), distill=SimpleNamespace(guidance=1.0), mixture=Mixture([source], 0), sources=[source],
        buckets=buckets, tokenizer=SimpleNamespace(downsampling=4), seed=0,
    )  # fmt: skip
    items = list(Samples(desk, range(18), 4))
    assert sum(isinstance(item, CaptionedPicture) for item in items) == GOOD + 1  # nothing is asked of the cut picture's pixels
    assert Counter(item.reason for item in items if isinstance(item, Skipped)).total() == len(BROKEN) - 1


def test_broken_predictions_of_a_teacher_cost_their_sample(tmp_path: Path) -> None:
    whole = some().to_bytes()
    samples = {"a": whole, "b": whole[:-4], "c": whole, "d": b""}
    members = {key: {"png": png(1), "txt": b"x", "targets": data} for key, data in samples.items()}
    path = write_samples(tmp_path / "a.tar", members)
    data = ShardDataset(ShardIndex.open(path), accept=check_targets)
    skipped: Counter[str] = Counter()
    assert [data.take(n, skipped).key for n in range(4)] == ["a", "c", "c", "a"] and skipped == {"targets unreadable": 2}


def test_figures_are_measured_on_the_samples_that_can_be_read(tmp_path: Path) -> None:
    about = json.dumps({"captions": ["a"], "attributes": {"concept": "a", "style": "3d", "background": "red"}}).encode()
    path = write_samples(tmp_path / "a.tar", {"x": {"png": b"no", "json": about}, "y": {"png": png(1), "json": about}})
    pipe: Any = SimpleNamespace(model=SimpleNamespace(tokenizer=SimpleNamespace(encoder=lambda images: images)))
    gallery = Gallery(pipe, [ShardDataset(ShardIndex.open(path)) for _ in range(2)])
    assert gallery.taught == 1 and len(gallery.renderings) == 2
    bad = write_samples(tmp_path / "b.tar", {"y": {"png": png(1), "txt": b"x"}})
    with pytest.raises(ValueError, match="sample y lacks a picture and the attributes concept"):
        Gallery(pipe, [ShardDataset(ShardIndex.open(bad))])
