"""Packing: the destination is whole or untouched, bad pictures are counted, captions say which rendering is meant."""

import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image
from small_files import picture_bytes, tar_bytes

from stages.data import archives, icons
from stages.data.archives import Archive, fetch
from stages.data.captions import PALETTE, STYLE_WORDS, captions_of, full_caption, with_article
from stages.data.cli import main
from stages.data.concepts import Concept, choose, held_out_backgrounds, held_out_concepts, rank, read_concepts
from stages.data.folder import FolderOptions, FolderSource, fit
from stages.data.icons import IconOptions, IconSource
from stages.data.pack import PackOptions, TooManyBad, pack
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.shards import ShardDataset, ShardIndex


class Dots:
    """A source of small pictures; `items` may hold anything a source may yield, or an exception to raise."""

    def __init__(self, items):
        self.items = items
        self.expected = len(items)

    def __iter__(self):
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            yield item

    def describe(self):
        return {"name": "dots"}


def dot(number, captions=("a dot",), **more):
    return CaptionedPicture(f"dot-{number}", Image.new("RGB", (6, 6), (number, 2, 3)), list(captions), {"n": number}, **more)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_pack_gives_back_pictures_captions_and_attributes(tmp_path):
    report = pack(Dots([dot(n) for n in range(7)]), tmp_path / "out", PackOptions(samples_per_shard=3))
    assert [shard["samples"] for shard in report["shards"]] == [3, 3, 1]
    assert sorted(content(tmp_path / "out")) == [*(f"out-{n:06d}.tar" for n in range(3)), "pack.json"]
    assert json.loads((tmp_path / "out/pack.json").read_text()) == report
    for shard in report["shards"]:
        assert hashlib.sha256((tmp_path / "out" / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    index = ShardIndex.open(tmp_path / "out")
    assert index.left_out == {}
    for number, sample in enumerate(map(ShardDataset(index).__getitem__, range(7))):
        assert sample.key == f"dot-{number}" and sample.captions == ["a dot"] and sample.attributes == {"n": number}
        assert np.array_equal(np.asarray(sample.picture), np.asarray(dot(number).picture))


def test_the_same_pictures_give_the_same_bytes(tmp_path):
    for place in ("a/out", "b/out"):
        pack(Dots([dot(n) for n in range(5)]), tmp_path / place)
    assert content(tmp_path / "a/out") == content(tmp_path / "b/out")


@pytest.mark.parametrize("accident", [RuntimeError("source"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_accident_leaves_nothing_behind(tmp_path, accident):
    with pytest.raises(type(accident)):
        pack(Dots([dot(1), dot(2), accident]), tmp_path / "out", PackOptions(samples_per_shard=1))
    assert list(tmp_path.iterdir()) == []


def test_an_accident_leaves_the_previous_pack(tmp_path):
    pack(Dots([dot(1)]), tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(RuntimeError):
        pack(Dots([dot(2), RuntimeError("source")]), tmp_path / "out", PackOptions(overwrite=True))
    with pytest.raises(ValueError, match="--overwrite"):
        pack(Dots([dot(2)]), tmp_path / "out")
    assert content(tmp_path / "out") == before
    pack(Dots([dot(2)]), tmp_path / "out", PackOptions(overwrite=True))
    assert ShardDataset(ShardIndex.open(tmp_path / "out"))[0].key == "dot-2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("one")
    with pytest.raises(ValueError, match="not a pack of ours"):
        pack(Dots([dot(1)]), tmp_path / "thesis", PackOptions(overwrite=True))
    assert content(tmp_path / "thesis") == {"chapter.txt": b"one"}


def test_bad_pictures_are_counted_by_reason(tmp_path):
    bad = [Skipped("x", "truncated"), Skipped("y", "truncated"), Skipped("z", "format"), dot(1), dot(3, ["\ud800"])]
    bad.append(dot(4, ["long " * 300_000]))
    report = pack(Dots([dot(1), *bad, dot(2)]), tmp_path / "out")
    assert report["samples"] == 2
    assert report["skipped"] == {
        "caption is no valid text": 1,
        "captions too long": 1,
        "duplicate key": 1,
        "format": 1,
        "truncated": 2,
    }


@pytest.mark.parametrize(
    "good, bad, max_bad, works", [(5, 10, 0.0, True), (5, 11, 0.0, False), (89, 11, 0.11, True), (88, 12, 0.11, False)]
)
def test_too_many_bad_pictures_end_the_packing(tmp_path, good, bad, max_bad, works):
    source = Dots([dot(n) for n in range(good)] + [Skipped(f"bad-{n}", "format") for n in range(bad)])
    if works:
        assert pack(source, tmp_path / "out", PackOptions(max_bad=max_bad))["skipped"] == {"format": bad}
        return
    with pytest.raises(TooManyBad, match=r"format, e\.g\. bad-0"):
        pack(source, tmp_path / "out", PackOptions(max_bad=max_bad))
    assert list(tmp_path.iterdir()) == []


def test_a_pack_without_pictures_is_an_error(tmp_path):
    for items in ([], [Skipped("x", "format")]):
        with pytest.raises(ValueError, match="no usable picture"):
            pack(Dots(items), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- captions


def test_the_first_caption_is_the_full_one():
    assert full_caption("red apple", "3d", "blue") == "a red apple, 3D style, on a blue background"
    assert full_caption("owl", "flat", "orange") == "an owl, flat style, on an orange background"
    for style in STYLE_WORDS:
        for background in PALETTE:
            assert captions_of("red apple", ("fruit",), style, background)[0] == full_caption("red apple", style, background)


def test_no_caption_means_two_renderings():
    meaning = {}
    for concept, tags in {
        "apple": ("fruit", "red"),
        "red apple": ("fruit",),
        "orange": ("fruit",),
        "orange owl": (),
    }.items():
        for style in STYLE_WORDS:
            for background in PALETTE:
                for caption in captions_of(concept, tags, style, background):
                    assert meaning.setdefault(caption, (concept, style, background)) == (concept, style, background), caption


def test_a_caption_leaves_out_only_what_is_a_default():
    for style, word in STYLE_WORDS.items():
        for background in PALETTE:
            for caption in captions_of("owl", ("bird",), style, background):
                assert f"{word} style" in caption or style == "3d"
                assert background in caption or background == "white"
    assert "owl" in captions_of("owl", (), "3d", "white") and "owl" not in captions_of("owl", (), "3d", "red")


def test_keywords_name_no_colour_and_repeat_nothing():
    assert "an owl (bird, night), 3D style, on a red background" in captions_of(
        "owl", ("blue", "owl", "bird", "night"), "3d", "red"
    )


@pytest.mark.parametrize(
    "concept, sentence",
    [
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("grapes", "grapes"),
        ("cactus", "a cactus"),
    ]
    + [
        ("bread", "bread"),
        ("meat on bone", "meat on bone"),
        ("kiss: woman, man", "kiss: woman, man"),
        ("compass", "a compass"),
    ]
    + [
        ("person with glasses", "a person with glasses"),
        ("one o'clock", "one o'clock"),
        ("1st place medal", "1st place medal"),
    ],
)
def test_articles(concept, sentence):
    assert with_article(concept) == sentence


def test_unknown_words_are_refused_with_the_choice():
    with pytest.raises(ValueError, match=r"mauve.*white"):
        full_caption("owl", "3d", "mauve")
    with pytest.raises(ValueError, match=r"oil.*flat"):
        full_caption("owl", "oil", "white")


# ---- concepts and hold-outs


def concepts(count):
    return [Concept(f"{n:x}", f"thing{chr(97 + n % 26)}", (), 3 + n % 6, n % 4) for n in range(count)]


def test_flags_components_and_skin_tones_are_left_out():
    entries = [
        {
            "label": "waving hand",
            "hexcode": "1F44B",
            "group": 1,
            "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}],
        },
        {"label": "flag: Peru", "hexcode": "1F1F5-1F1EA", "group": 9},
        {"label": "red hair", "hexcode": "1F9B0", "group": 2},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {"label": "umbrella", "hexcode": "2602-FE0F", "group": 5, "tags": ["rain"]},
    ]
    assert [concept.label for concept in read_concepts(entries)] == ["waving hand", "umbrella"]
    assert read_concepts(entries)[1].hexcode == "2602" and read_concepts(entries)[1].tags == ("rain",)
    assert len(read_concepts(entries, flags=True, skin_tones=True)) == 4


def test_a_longer_choice_contains_a_shorter_one_and_both_are_diverse():
    everything = concepts(120)
    assert sorted(concept.hexcode for concept in rank(everything)) == sorted(concept.hexcode for concept in everything)
    assert choose(everything, "60")[:20] == choose(everything, "20")
    groups = [concept.group for concept in choose(everything, "20")]
    assert {group: groups.count(group) for group in groups} == {3: 4, 4: 4, 5: 4, 6: 4, 7: 4}


def test_concepts_can_be_listed_in_a_file(tmp_path):
    (tmp_path / "list.txt").write_text("# mine\nThingB\n0\n")
    assert [concept.hexcode for concept in choose(concepts(3), str(tmp_path / "list.txt"))] == ["1", "0"]
    (tmp_path / "list.txt").write_text("thinga\nunheard of\n")
    with pytest.raises(ValueError, match=r"line 2.*unheard of"):
        choose(concepts(3), str(tmp_path / "list.txt"))
    for wish in ("0", "4", "-1"):
        with pytest.raises(ValueError, match="share 3 concepts"):
            choose(concepts(3), wish)


@pytest.mark.parametrize("pictures, fraction", [(200, 0.15), (200, 0.5), (3, 0.5), (1, 0.5)])
def test_every_picture_and_background_keeps_at_least_half(pictures, fraction):
    names = [f"p{n}" for n in range(pictures)]
    held = held_out_backgrounds(names, tuple(PALETTE), fraction, seed=0)
    assert max(map(len, held.values())) <= 6
    assert all(2 * sum(ground in away for away in held.values()) <= pictures for ground in PALETTE)
    if pictures == 200:
        found = sum(map(len, held.values())) / (200 * 12)
        assert abs(found - fraction) < 0.03
    assert held == held_out_backgrounds(names, tuple(PALETTE), fraction, seed=0)


def test_another_seed_holds_out_others():
    assert held_out_concepts(concepts(100), 0.1, 0) == held_out_concepts(concepts(100)[::-1], 0.1, 0)
    assert held_out_concepts(concepts(100), 0.1, 0) != held_out_concepts(concepts(100), 0.1, 1)
    assert len(held_out_concepts(concepts(100), 0.1, 0)) == 10


# ---- icons, from tiny archives of the same shape


def tgz(path, members):
    data = tar_bytes(((f"package/{name}", member) for name, member in members.items()), "w:gz")
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def webp(colour):
    drawing = Image.new("RGBA", (64, 64))
    drawing.paste(colour, (16, 16, 48, 48))
    return picture_bytes(drawing, "WEBP", lossless=True)


LABELS = ["fox", "pear", "bus", "kite", "key", "owl", "plum", "tram", "ball", "pen"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    codes = [f"1F6{n:02X}" for n in range(len(LABELS))]
    entries = [
        {
            "label": label,
            "hexcode": code + ("-FE0F" if n == 0 else ""),
            "group": 3 + n % 5,
            "subgroup": n % 5,
            "tags": ["tag"],
        }
        for n, (label, code) in enumerate(zip(LABELS, codes, strict=True))
    ]
    bodies = {
        "square": {"body": '<path fill="#0000ff" d="M0 0h4v8H0z"/>', "width": 8, "height": 8},
        "ink": {"body": '<path fill="currentColor" d="M2 2h4v4H2z"/>', "width": 8, "height": 8},
    }
    flat = {"icons": bodies, "aliases": {"mirrored": {"parent": "square", "hFlip": True}}, "width": 8, "height": 8}
    chars = {codes[1].lower(): "square", codes[2].lower(): "mirrored", codes[3].lower(): "ink"}
    members = {
        "emojibase-data": {"en/data.json": json.dumps(entries).encode()},
        "set-3d": {
            f"assets/{code.lower()}{'-fe0f' if n == 0 else ''}.webp": webp((20 * n, 0, 0, 255)) for n, code in enumerate(codes)
        },
        "set-flat": {"icons.json": json.dumps(flat).encode(), "chars.json": json.dumps(chars).encode()},
    }
    made = {}
    for package, files in members.items():
        made[package] = Archive(package, "1.0.0", tgz(folder / f"{package}-1.0.0.tgz", files))
    monkeypatch.setattr(icons, "CAPTIONS", made["emojibase-data"])
    monkeypatch.setattr(icons, "STYLE_ARCHIVES", {"3d": made["set-3d"], "flat": made["set-flat"]})
    return folder


def renderings(cache, **options):
    return {sample.key: sample for sample in IconSource(IconOptions(**{"size": 16, "styles": ("3d",)} | options), cache)}


def test_an_icon_lies_on_its_background_with_its_captions(cache):
    samples = renderings(cache)
    assert len(samples) == 10 * 12
    sample = samples["1f601-3d-blue"]
    assert sample.captions[0] == "a pear, 3D style, on a blue background"
    assert sample.attributes["concept"] == "pear" and sample.attributes["group"] == "food & drink"
    assert sample.picture.mode == "RGB" and sample.picture.size == (16, 16)
    assert sample.picture.getpixel((0, 0)) == PALETTE["blue"] and sample.picture.getpixel((8, 8)) == (20, 0, 0)
    assert "1f600-3d-white" in samples


def test_train_and_heldout_share_no_pair_and_make_up_everything(cache):
    everything = renderings(cache)
    train = renderings(cache, hold_out_pairs=0.25)
    heldout = renderings(cache, hold_out_pairs=0.25, split="heldout")
    assert not set(train) & set(heldout) and set(train) | set(heldout) == set(everything)
    assert 20 <= len(heldout) <= 40
    assert {sample.attributes["concept"] for sample in train.values()} == set(LABELS)
    assert {sample.attributes["background"] for sample in train.values()} == set(PALETTE)
    assert all(sample.attributes["held_out"] == "pair" for sample in heldout.values())
    assert set(renderings(cache, hold_out_pairs=0.25, seed=1)) != set(train)


def test_held_out_pictures_share_no_concept_with_training(cache):
    train = renderings(cache, hold_out_pictures=0.2)
    heldout = renderings(cache, hold_out_pictures=0.2, split="heldout", renderings_per_picture=2)
    seen, unseen = ({sample.attributes["concept"] for sample in samples.values()} for samples in (train, heldout))
    assert len(unseen) == 2 and seen == set(LABELS) - unseen and len(heldout) == 4


def test_random_backgrounds_are_some_of_the_allowed(cache):
    few = renderings(cache, renderings_per_picture=3, hold_out_pairs=0.25)
    assert len(few) == 30 and set(few) < set(renderings(cache, hold_out_pairs=0.25))
    assert len({sample.attributes["background"] for sample in few.values()}) > 3


def test_svg_icons_aliases_and_ink(cache):
    pytest.importorskip("resvg_py")
    samples = renderings(cache, styles=("flat",), backgrounds=("white", "black"))
    assert len(samples) == 3 * 2
    # a drawing half as wide as its grid is centred; its mirror image looks the same there
    for code in ("1f601", "1f602"):
        assert samples[f"{code}-flat-white"].picture.getpixel((8, 8)) == (0, 0, 255)
        assert samples[f"{code}-flat-white"].picture.getpixel((0, 8)) == (255, 255, 255)
    assert samples["1f603-flat-white"].picture.getpixel((8, 8)) == (0, 0, 0)
    assert samples["1f603-flat-black"].picture.getpixel((8, 8)) == (255, 255, 255)
    both = IconSource(IconOptions(size=16, styles=("3d", "flat"), concepts="3"), cache)
    assert {concept.label for concept in both.concepts} == {"pear", "bus", "kite"}


def test_an_alias_flips_what_it_names(cache):
    pytest.importorskip("resvg_py")
    style = icons.IconStyle("flat", cache)
    plain, mirrored = (icons._render_svg(style._svg[code], 8, "#000000") for code in ("1f601", "1f602"))
    assert plain.getpixel((1, 4))[3] == 255 and plain.getpixel((6, 4))[3] == 0
    assert np.array_equal(np.asarray(plain)[:, ::-1], np.asarray(mirrored))


def test_options_that_make_no_sense_are_refused():
    for wrong in (
        {"size": 4},
        {"styles": ("3d", "oil")},
        {"styles": ()},
        {"backgrounds": ("mauve",)},
        {"backgrounds": ("red", "red")},
        {"hold_out_pairs": 0.9},
        {"split": "test"},
        {"split": "heldout"},
        {"renderings_per_picture": -1},
    ):
        with pytest.raises(ValueError):
            IconOptions(**wrong)


def test_no_private_path_in_the_manifest(cache, tmp_path):
    (tmp_path / "list.txt").write_text("fox\npear\n")
    source = IconSource(IconOptions(size=16, styles=("3d",), concepts=str(tmp_path / "list.txt")), cache)
    pack(source, tmp_path / "out")
    text = (tmp_path / "out/pack.json").read_text()
    assert str(tmp_path) not in text and "list.txt" in text


# ---- fetching


def test_without_npm_the_error_says_what_to_install_and_where_to_place(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get install npm.*@a/b@1\.0.*a-b-1\.0\.tgz"):
        fetch(Archive("@a/b", "1.0", "0" * 64), tmp_path / "cache")


def test_an_archive_is_fetched_once_and_checked(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\nprintf hello > a-b-1.0.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setattr(archives.shutil, "which", lambda name: str(npm))
    right = Archive("@a/b", "1.0", hashlib.sha256(b"hello").hexdigest())
    for _ in range(2):
        assert fetch(right, tmp_path / "cache").read_bytes() == b"hello"
    assert (tmp_path / "calls").read_text().split()[:2] == ["pack", "@a/b@1.0"] and (tmp_path / "calls").read_text().count(
        "\n"
    ) == 1
    assert os.listdir(tmp_path / "cache") == ["a-b-1.0.tgz"]
    with pytest.raises(ValueError, match="damaged or another file"):
        fetch(Archive("@a/b", "1.0", "0" * 64), tmp_path / "cache")


def test_a_failing_npm_is_reported(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho E404 no such package >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(archives.shutil, "which", lambda name: str(npm))
    with pytest.raises(FileNotFoundError, match="E404 no such package"):
        fetch(Archive("a", "1.0", "0" * 64), tmp_path / "cache")


# ---- folders


def picture_file(path, colour=(9, 8, 7), size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_text_files_caption_their_pictures(tmp_path):
    picture_file(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a brown field\nbrown\n\n")
    picture_file(tmp_path / "sub/a.jpg")
    (tmp_path / "sub/a.txt").write_text("another")
    picture_file(tmp_path / "silent.webp")
    (tmp_path / "notes.md").write_text("ignored")
    items = list(FolderSource(tmp_path, FolderOptions(size=16)))
    samples = [item for item in items if isinstance(item, CaptionedPicture)]
    assert [sample.captions for sample in samples] == [["a brown field", "brown"], ["another"]]
    assert len({sample.key for sample in samples}) == 2 and all(sample.picture.size == (16, 16) for sample in samples)
    assert [item for item in items if isinstance(item, Skipped)] == [Skipped("silent.webp", "no caption")]


def test_tables_caption_their_pictures(tmp_path):
    for name in ("a", "b", "c"):
        picture_file(tmp_path / f"{name}.png")
    (tmp_path / "t.jsonl").write_text(
        '{"file": "a.png", "captions": ["one", "two"], "artist": "x"}\n\n{"file": "b.png", "caption": "three"}\n'
    )
    (tmp_path / "t.csv").write_text('file,caption,artist\na.png,"one, or two",x\nc.png,three,y\n')
    table = [(s.captions, s.attributes) for s in FolderSource(tmp_path, FolderOptions(table="t.jsonl"))]
    assert table == [(["one", "two"], {"file": "a.png", "artist": "x"}), (["three"], {"file": "b.png"})]
    table = [(s.captions, s.attributes["artist"]) for s in FolderSource(tmp_path, FolderOptions(table="t.csv"))]
    assert table == [(["one, or two"], "x"), (["three"], "y")]


def test_no_file_outside_the_folder_is_read(tmp_path):
    picture_file(tmp_path / "secret.png")
    picture_file(tmp_path / "in/a.png")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "secret.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "a.png\0", "missing.png", "a.png"]
    (tmp_path / "in/t.jsonl").write_text("".join(json.dumps({"file": name, "caption": "x"}) + "\n" for name in names))
    items = list(FolderSource(tmp_path / "in", FolderOptions(table="t.jsonl")))
    assert [getattr(item, "reason", "read") for item in items] == [*["outside the folder"] * 4, "missing", "read"]
    with pytest.raises(FileNotFoundError, match="inside"):
        FolderSource(tmp_path / "in", FolderOptions(table="../in.jsonl"))


def test_broken_and_tiny_files_are_skipped_with_a_reason(tmp_path):
    for name, data in {"empty": b"", "noise": bytes(500)}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    picture_file(tmp_path / "strip.png", size=(1, 10000))
    for path in list(tmp_path.glob("*.png")):
        path.with_suffix(".txt").write_text("x")
    assert [(item.name, item.reason) for item in FolderSource(tmp_path)] == [
        ("empty.png", "empty"),
        ("noise.png", "format"),
        ("strip.png", "too small"),
    ]


def test_tables_with_mistakes_name_the_row(tmp_path):
    picture_file(tmp_path / "a.png")
    for text, message in (
        ("{", "line 1"),
        ("[]", "line 1"),
        ('{"name": "a.png"}', "row 1.*file"),
        ('{"file": "a.png", "caption": 3}', "row 1"),
    ):
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            FolderSource(tmp_path, FolderOptions(table="t.jsonl"))


def test_crop_pad_and_none(tmp_path):
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    assert np.array_equal(np.asarray(fit(wide, 10, "crop")), np.full((10, 10, 3), (0, 0, 255)))
    padded = fit(wide, 40, "pad")
    assert padded.getpixel((20, 2)) == (255, 255, 255) and padded.getpixel((20, 20)) == (0, 0, 255) and padded.size == (40, 40)
    wide.save(tmp_path / "w.jpg")
    (tmp_path / "w.txt").write_text("wide")
    pack(FolderSource(tmp_path, FolderOptions(fit="none")), tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    dataset = ShardDataset(index)
    offset, size = index.entries[0].members["jpg"]
    shard = (tmp_path / "out" / index.shards[0].name).read_bytes()
    assert shard[offset : offset + size] == (tmp_path / "w.jpg").read_bytes()
    assert dataset[0].picture.size == (40, 20)


# ---- the command line


def test_the_command_packs_and_inspects(tmp_path, cache, capsys):
    arguments = [
        "--cache",
        str(cache),
        "--styles",
        "3d",
        "--backgrounds",
        "white,blue",
        "--size",
        "16",
        "--concepts",
        "4",
    ]
    assert main(["pack", "icons", str(tmp_path / "out"), *arguments]) == 0
    assert "8 samples in 1 shards; skipped: none" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--json", "--examples", "2"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (
        summary["samples"] == 8
        and summary["attributes"]["background"] == {"white": 4, "blue": 4}
        and len(summary["examples"]) == 2
    )
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "concept: 4 values" in capsys.readouterr().out


def test_the_command_packs_a_folder(tmp_path, capsys):
    picture_file(tmp_path / "in/a.png")
    (tmp_path / "in/a.txt").write_text("x")
    (tmp_path / "in/b.png").write_bytes(b"no picture")
    (tmp_path / "in/b.txt").write_text("x")
    assert main(["pack", "folder", str(tmp_path / "out"), str(tmp_path / "in"), "--fit", "pad"]) == 0
    assert "1 samples in 1 shards; skipped: 1 format" in capsys.readouterr().out


def test_a_destination_that_is_taken_is_told_before_the_source_is_opened(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["pack", "folder", str(tmp_path / "out"), str(tmp_path / "nowhere")]) == 2
    assert "is not a pack of ours" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


def test_mistakes_of_the_user_exit_with_two_and_a_message(tmp_path, cache, capsys):
    for arguments, message in (
        (["inspect", str(tmp_path / "missing.tar")], "no shard at"),
        (["pack", "folder", str(tmp_path / "out"), str(tmp_path / "missing")], "is no folder"),
        (["pack", "icons", str(tmp_path / "out"), "--cache", str(cache), "--backgrounds", "mauve"], "mauve"),
        (["pack", "icons", str(tmp_path / "out"), "--cache", str(cache), "--backgrounds", "99"], "1 to 12"),
        (
            ["pack", "icons", str(tmp_path / "out"), "--cache", str(cache), "--styles", "3d", "--concepts", "999"],
            "10 concepts",
        ),
        (["pack", "icons", str(tmp_path / "out"), "--cache", str(cache), "--split", "heldout"], "--hold-out-pairs"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
