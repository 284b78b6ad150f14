"""Scenes of icons with true attributes, the detector that reads them back, and GenEval's tasks on them."""

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from serve_model import class_folder, text_folder
from test_data_pack import tgz

from stages import cli
from stages.data import icons, scenes
from stages.data.archives import Archive
from stages.data.cli import main as data
from stages.data.pieces import box_of, pieces
from stages.data.sample import Skipped
from stages.data.scene_names import NAMES
from stages.data.scene_words import colourless, one, plural, related, worded
from stages.data.scenes import TASKS, Scene, SceneOptions, SceneSource, Shelf
from stages.measure.detector import Detector, Found, right

SHAPES = {  # in a square of 8
    "fox": [(0, 0), (8, 0), (4, 8)],
    "box": [(0, 0), (8, 0), (8, 8), (0, 8)],
    "kite": [(4, 0), (8, 4), (4, 8), (0, 4)],
    "plank": [(0, 3), (8, 3), (8, 5), (0, 5)],
    "post": [(3, 0), (5, 0), (5, 8), (3, 8)],
    "step": [(0, 0), (3, 0), (3, 5), (8, 5), (8, 8), (0, 8)],
    "red apple": [(0, 0), (8, 0), (8, 3), (5, 3), (5, 8), (3, 8), (3, 3), (0, 3)],
    "arrow": [(0, 8), (4, 0), (8, 8), (4, 5)],
}
COLOURS = [(150, 20, 60), (20, 90, 90), (90, 120, 10), (60, 20, 120), (140, 70, 70), (10, 60, 20), (170, 90, 160), (90, 30, 10)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Any:
    """Icon archives of eight shapes in two styles, and of two dots far apart, which is no single thing."""
    folder = tmp_path_factory.mktemp("archives")
    labels = [*SHAPES, "dots"]
    codes = [f"1f6{n:02x}" for n in range(len(labels))]
    entries = [
        {"label": label, "hexcode": code.upper(), "group": 3 + n % 5, "subgroup": n, "tags": ["tag"]}
        for n, (label, code) in enumerate(zip(labels, codes, strict=True))
    ]
    coloured, bodies = {}, {}
    for n, (label, code) in enumerate(zip(labels, codes, strict=True)):
        corners = SHAPES.get(label)
        if corners is None:
            corners, path = [(0, 0), (1, 0), (1, 1), (0, 1)], "M0 0h1v1H0zM7 7h1v1H7z"
        else:
            path = "M" + "L".join(f"{x} {y}" for x, y in corners) + "z"
        picture = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(picture).polygon([(8 * x, 8 * y) for x, y in corners], fill=(*COLOURS[n % len(COLOURS)], 255))
        file = io.BytesIO()
        picture.save(file, format="WEBP", lossless=True)
        coloured[f"assets/{code}.webp"] = file.getvalue()
        bodies[label] = {"body": f'<path fill="currentColor" d="{path}"/>', "width": 8, "height": 8}
    chars = {code: label for label, code in zip(labels, codes, strict=True)}
    members = {
        "emojibase-data": {"en/data.json": json.dumps(entries).encode()},
        "set-3d": coloured,
        "set-ink": {"icons.json": json.dumps({"icons": bodies}).encode(), "chars.json": json.dumps(chars).encode()},
    }
    made = {name: Archive(name, "1.0.0", tgz(folder / f"{name}-1.0.0.tgz", files)) for name, files in members.items()}
    styles = {"3d": made["set-3d"], "high-contrast": made["set-ink"]}
    with pytest.MonkeyPatch.context() as patch:
        for module in (icons, scenes):
            patch.setattr(module, "STYLE_ARCHIVES", styles)
            patch.setattr(module, "CAPTIONS", made["emojibase-data"])
        yield folder


def source(cache: Path, **options: Any) -> SceneSource:
    asked = {"size": 128, "styles": ("3d", "high-contrast"), "concepts": "all", "count": 60}
    return SceneSource(SceneOptions(**(asked | options)), cache)


def test_what_is_asked_is_what_is_found(cache: Path) -> None:
    """The detector reads every scene rightly, of either split, also from half the size."""
    detector = Detector(Shelf(("3d", "high-contrast"), "all", cache))
    for split in ("train", "heldout"):
        made: list[Any] = list(source(cache, split=split))
        assert [sample.attributes["task"] for sample in made[:6]] == list(TASKS)
        assert {name for sample in made for name in sample.attributes["concepts"]} == set(SHAPES)  # dots are not in one piece
        for sample in made:
            assert sample.picture.size == (128, 128)
            for picture in (sample.picture, sample.picture.resize((64, 64), Image.Resampling.BOX)):
                assert right(detector(picture), sample.attributes["geneval"]), sample.captions[0]


def test_the_same_options_give_the_same_scenes(cache: Path) -> None:
    one, again, other = (list(source(cache, count=12, seed=seed)) for seed in (0, 0, 1))
    same = [np.array_equal(a.picture, b.picture) and a.captions == b.captions for a, b in zip(one, again, strict=True)]  # type: ignore[union-attr]
    assert all(same) and [x.captions for x in one] != [x.captions for x in other]  # type: ignore[union-attr]


def test_combinations_are_held_out_by_name(cache: Path) -> None:
    """Two concepts that are held out together never meet in training, whatever the task; so with numbers and colours."""
    made = {split: list(source(cache, split=split, count=240, hold_out=0.3)) for split in ("train", "heldout")}
    pairs: dict[str, set[Any]] = {split: set() for split in made}
    colours: dict[str, set[Any]] = {split: set() for split in made}
    numbers: dict[str, set[Any]] = {split: set() for split in made}
    for split, samples in made.items():
        for sample in samples:
            include = sample.attributes["geneval"]["include"]  # type: ignore[union-attr]
            if len(include) == 2:
                pairs[split].add(frozenset(wanted["class"] for wanted in include))
            elif include[0]["count"] > 1:
                numbers[split].add((include[0]["class"], include[0]["count"]))
            elif "color" in include[0]:
                colours[split].add((include[0]["class"], include[0]["color"]))
    assert all(found[split] for found in (pairs, colours, numbers) for split in made)
    assert not colours["train"] & colours["heldout"] and not numbers["train"] & numbers["heldout"]
    seed_pairs = {frozenset(pair) for pair in pairs["train"]}
    plain = [s for s in made["heldout"] if s.attributes["task"] in ("two_object", "position")]  # type: ignore[union-attr]
    assert plain and not {frozenset(s.attributes["concepts"]) for s in plain} & seed_pairs  # type: ignore[union-attr]


def test_other_names_and_another_order_are_held_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A taught name stands in some captions of its thing and an untaught one in none; no caption has the order of `order`."""
    monkeypatch.setattr(scenes, "NAMES", {"fox": "reynard", "box": "crate", "kite": "glider", "plank": "board", "post": "pole"})
    made = source(cache, count=240)
    assert made._taught and made._untaught  # by name and seed: both kinds are among five
    seen: set[str] = set()
    for sample in made:
        assert not isinstance(sample, Skipped)
        text, untaught = " ".join(sample.captions), sample.attributes["untaught"]
        assert not any(name in text for name in made._untaught.values())
        assert all(label in text and label in sample.captions[0] for label in sample.attributes["concepts"])
        seen |= {name for name in made._taught.values() if name in text}
        assert untaught["order"] not in sample.captions and ("name" in untaught) == bool(
            made._untaught.keys() & set(sample.attributes["concepts"])
        )
        if "name" in untaught:
            assert sum(name in untaught["name"] for name in made._untaught.values()) >= 1
    assert seen == set(made._taught.values())


def test_names_mean_one_thing() -> None:
    assert len(set(NAMES.values())) == len(NAMES) > 150 and not NAMES.keys() & set(NAMES.values())


@pytest.mark.parametrize("size", [128, 96, 50])
def test_a_thing_looks_the_same_wherever_it_stands(cache: Path, size: int) -> None:
    """In whole cells of the grid, so that a tokenizer sees it at the same place within its tokens."""
    made = source(cache, size=size)
    fox = made.shelf.concepts[0]
    scene, seen, cell = Scene("counting", "high-contrast", "blue", (fox,), 4, ("white",)), set(), size // 4
    for seed in range(6):
        picture = np.asarray(made.picture(scene, random.Random(seed)))
        places = scenes._places(scene, random.Random(seed))
        assert len(set(places)) == 4 and all(at >= 0 and at + side <= 4 for *corner, side in places for at in corner)
        seen |= {side for *_, side in places}
        if size % 4 == 0:
            cut = [picture[y * cell : (y + side) * cell, x * cell : (x + side) * cell] for x, y, side in places]
            assert all(np.array_equal(one, cut[0]) for one in cut) and len(np.unique(cut[0].reshape(-1, 3), axis=0)) > 1
    assert seen == {2}


def test_only_what_has_no_colour_is_given_one(cache: Path) -> None:
    made: list[Any] = list(source(cache, count=120))
    coloured = [wanted for s in made for wanted in s.attributes["geneval"]["include"] if "color" in wanted]
    assert coloured and all(wanted["class"] != "red apple" for wanted in coloured)
    assert not colourless("red apple") and colourless("fox")


def test_wordings() -> None:
    plurals = {"fox": "foxes", "berry": "berries", "key": "keys", "red apple": "red apples", "mouse": "mice", "torch": "torches"}
    plurals |= {"grapes": "grapes", "face with open hands": "faces with open hands", "woman gesturing OK": "women gesturing OK"}
    plurals |= {
        "person: beard": "people: beard",
        "office building": "office buildings",
        "bus": "buses",
        "pile of poo": "piles of poo",
    }
    assert {word: plural(word) for word in plurals} == plurals
    assert [one("gloves", size="small"), one("fox", "orange"), one("bread", "red")] == [
        "small gloves",
        "an orange fox",
        "red bread",
    ]
    assert related("a fox", "left of", "an owl")[0] == "a fox to the left of an owl"
    assert "an owl right of a fox" in related("a fox", "left of", "an owl") and "an owl left of a fox" not in related(
        "a fox", "left of", "an owl"
    )
    assert worded(["a fox"], "3d", "white")[0] == "a fox, 3D style, on a white background"
    assert "a fox" in worded(["a fox"], "3d", "white")  # no style means 3D, no ground means white
    assert "a fox" not in worded(["a fox"], "flat", "white") and "a fox, 3D style" not in worded(["a fox"], "3d", "blue")
    assert worded(["a fox"], "3d", "meadow")[0] == "a fox, 3D style, in a meadow"


def test_the_line_of_geneval(cache: Path) -> None:
    fox, box, *_ = Shelf(("3d", "high-contrast"), "all", cache).concepts
    place = Scene("position", "3d", "blue", (fox, box), relation="left of")
    assert place.geneval() == {
        "tag": "position",
        "include": [{"class": box.label, "count": 1}, {"class": fox.label, "count": 1, "position": ["left of", 0]}],
        "prompt": f"a {fox.label} to the left of a {box.label}, 3D style, on a blue background",
    }
    three = Scene("counting", "3d", "blue", (fox,), count=3).geneval()
    assert three["include"] == [{"class": fox.label, "count": 3}] and three["exclude"] == [{"class": fox.label, "count": 4}]


def found(label: str, x: float, y: float, color: str = "red") -> Found:
    return Found(label, "3d", color, (x - 0.1, y - 0.1, x + 0.1, y + 0.1), 0.0)


@pytest.mark.parametrize(
    ("pictures", "asked", "is_right"),
    [
        ([found("fox", 0.5, 0.5)], [{"class": "fox", "count": 1}], True),
        ([found("box", 0.5, 0.5)], [{"class": "fox", "count": 1}], False),
        ([found("fox", 0.2, 0.5), found("fox", 0.8, 0.5)], [{"class": "fox", "count": 2}], True),
        ([found("fox", 0.2, 0.5)], [{"class": "fox", "count": 2}], False),
        ([found("fox", 0.5, 0.5)], [{"class": "fox", "count": 1, "color": "red"}], True),
        ([found("fox", 0.5, 0.5)], [{"class": "fox", "count": 1, "color": "blue"}], False),
        (
            [found("fox", 0.2, 0.5), found("box", 0.8, 0.5)],
            [{"class": "box", "count": 1}, {"class": "fox", "count": 1, "position": ["left of", 0]}],
            True,
        ),
        (
            [found("fox", 0.8, 0.5), found("box", 0.2, 0.5)],
            [{"class": "box", "count": 1}, {"class": "fox", "count": 1, "position": ["left of", 0]}],
            False,
        ),
        (  # not far enough to the left
            [found("fox", 0.48, 0.2), found("box", 0.5, 0.8)],
            [{"class": "box", "count": 1}, {"class": "fox", "count": 1, "position": ["left of", 0]}],
            False,
        ),
        (
            [found("fox", 0.5, 0.8, "blue"), found("fox", 0.5, 0.2, "red"), found("box", 0.5, 0.5)],
            [{"class": "box", "count": 1}, {"class": "fox", "count": 1, "color": "red", "position": ["above", 0]}],
            True,
        ),
    ],
)
def test_right_and_wrong(pictures: list[Found], asked: list[dict[str, Any]], is_right: bool) -> None:
    assert right(pictures, {"include": asked}) is is_right


def test_one_too_many_is_wrong() -> None:
    asked = {"include": [{"class": "fox", "count": 2}], "exclude": [{"class": "fox", "count": 3}]}
    assert right([found("fox", x, 0.5) for x in (0.2, 0.8)], asked)
    assert not right([found("fox", x, 0.5) for x in (0.2, 0.5, 0.8)], asked)


def test_pieces_join_over_a_small_gap() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:5, 2:5] = mask[2:5, 8:11] = mask[15:18, 2:5] = True
    assert [box_of(part) for part in pieces(mask, 4)] == [(2, 2, 11, 5), (2, 15, 5, 18)]
    assert len(pieces(mask, 2)) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"styles": ("3d",)}, "--styles 3d: give high-contrast"),
        ({"styles": ("3d", "oil")}, "--styles 3d,oil"),
        ({"size": 8}, "--size 8: give 32 to 1024"),
        ({"count": 0}, "--count 0"),
        ({"hold_out": 0.0}, "--hold-out 0.0"),
        ({"split": "test"}, "--split test"),
        ({"concepts": "1"}, "two concepts or more"),
    ],
)
def test_options_that_make_no_sense(cache: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        source(cache, **options)


@pytest.mark.slow
def test_a_model_is_measured(cache: Path, tmp_path: Path, capsys: Any) -> None:
    """Rows of the scenes, of what the tokenizer gives back, and of the model; fewer scenes than asked for is an error."""
    arguments = [
        "pack",
        "scenes",
        str(tmp_path / "held"),
        "--styles",
        "3d,high-contrast",
        "--concepts",
        "all",
        "--split",
        "heldout",
    ]
    assert data([*arguments, "--count", "12", "--size", "64", "--cache", str(cache)]) == 0
    model = text_folder(tmp_path / "model")
    asked = ["composition", "--scenes", str(tmp_path / "held"), "--cache", str(cache), "--count"]
    capsys.readouterr()
    assert cli.measure([*asked, "2", "--model", str(model), "--json", "--prompts", str(tmp_path / "p.jsonl")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["scenes"] == dict.fromkeys((*TASKS, "overall"), 1.0)
    assert rows["generated"]["overall"] < 1.0  # random weights
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["tag"] for line in lines] == [task for task in TASKS for _ in range(2)]
    assert cli.measure([*asked, "1", "--grid", str(tmp_path / "g.png")]) == 0
    assert "| scenes | 100.0% |" in capsys.readouterr().out and Image.open(tmp_path / "g.png").height > 3 * 64
    assert cli.measure([*asked, "3"]) == 2
    assert "holds 2 scenes of the task single_object" in capsys.readouterr().err
    ordered = ["1", "--wording", "order", "--prompts", str(tmp_path / "o.jsonl")]
    assert cli.measure([*asked, *ordered, "--model", str(model)]) == 0
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(prompts) == len(TASKS) and all(
        re.match(r"(on an? \w+ background|in|at|on) ?.*, .* style$", text) for text in prompts
    )
    assert cli.measure([*asked, "1", "--wording", "name"]) == 2
    assert "in --wording name, --count wants 1 of each" in capsys.readouterr().err
    assert cli.measure([*asked, "1", "--model", str(class_folder(tmp_path / "classes"))]) == 2
    assert "a model of classes" in capsys.readouterr().err
