"""An index file is the shards themselves, as far as the samples go; a damaged or hostile one is refused."""

import json

import pytest
from PIL import Image
from small_files import picture_bytes, write_samples

from stages.data import files
from stages.data.cli import main
from stages.data.files import ChangedShard
from stages.data.index_file import write_index
from stages.data.locations import beside
from stages.data.metadata import Shape
from stages.data.shards import ShardDataset, ShardIndex


def write_shard(path, first, count):
    path.parent.mkdir(exist_ok=True)
    samples = {}
    for n in range(first, first + count):
        text = json.dumps({"captions": [f"dot {n}"], "attributes": {"n": n, "deep": {"er": n % 2}}}).encode()
        samples[f"s{n}"] = {"png": picture_bytes(Image.new("RGB", (5, 4), (n, 0, 7))), "json": text, "pkl": b"x"}
    write_samples(path, samples)


@pytest.fixture
def folder(tmp_path):
    write_shard(tmp_path / "data" / "a.tar", 0, 4)
    write_shard(tmp_path / "data" / "sub" / "b.tar", 4, 3)
    return tmp_path / "data"


@pytest.fixture
def index(folder):
    write_index([folder / "a.tar", folder / "sub"], folder / "all.jsonl")
    return folder / "all.jsonl"


def keys(index):
    return [entry.key for entry in index.entries]


def test_an_index_file_gives_the_same_index_without_reading_the_shards(folder, index, monkeypatch):
    keep = ["n != 2", "deep.er == 0"]
    shards = [folder / "a.tar", folder / "sub" / "b.tar"]
    whole, kept = ShardIndex.open(shards), ShardIndex.open(shards, keep)
    opened = []
    monkeypatch.setattr(files, "LocalFile", lambda path, real=files.LocalFile: opened.append(path) or real(path))
    for expected, found in ((whole, ShardIndex.open(index)), (kept, ShardIndex.open([index], keep))):
        assert (found.hash, found.left_out, keys(found)) == (expected.hash, expected.left_out, keys(expected))
        assert [entry.members for entry in found.entries] == [entry.members for entry in expected.entries]
        assert ShardDataset(found).shape(0) == Shape(4, 5)
    assert opened == [str(index)] * 2 and keys(kept) == ["s0", "s4", "s6"]
    assert ShardDataset(ShardIndex.open(index, keep))[1].captions == ["dot 4"]


def test_an_index_file_moves_with_its_shards(folder, index, tmp_path):
    folder.rename(tmp_path / "elsewhere")
    data = ShardDataset(ShardIndex.open(tmp_path / "elsewhere" / "all.jsonl"))
    assert [data[n].captions for n in (0, 6)] == [["dot 0"], ["dot 6"]]


def test_shards_outside_the_folder_are_named_absolutely(folder, tmp_path):
    (tmp_path / "lists").mkdir()
    write_index([folder / "a.tar"], tmp_path / "lists" / "a.jsonl")
    (tmp_path / "lists").rename(tmp_path / "moved")
    assert ShardDataset(ShardIndex.open(tmp_path / "moved" / "a.jsonl"))[3].key == "s3"


def test_index_files_can_be_joined_and_indexed_again(folder, index):
    write_index(index, folder / "again.jsonl")
    assert (folder / "again.jsonl").read_text() == index.read_text()
    write_index(folder / "a.tar", folder / "a.jsonl")
    assert keys(ShardIndex.open([folder / "a.jsonl", folder / "sub"])) == keys(ShardIndex.open(index))


def test_a_shard_that_changed_since_is_an_error_when_it_is_read(folder, index):
    data = ShardDataset(ShardIndex.open(index))
    write_shard(folder / "a.tar", 0, 40)
    with pytest.raises(ChangedShard, match=r"a\.tar was changed after it was indexed"):
        data.take(0)
    assert data.take(4).key == "s4"
    (folder / "sub" / "b.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.tar"):
        ShardDataset(data.index).take(4)


def test_samples_with_a_broken_header_are_told_when_they_are_read(folder, index):
    data = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(data.replace(b"\x89PNG", b"\x89PIG", 1))
    counts = write_index([folder / "a.tar"], index)
    assert counts == {"shards": 1, "samples": 4, "unreadable": 1, "left_out": {"member with another ending": 4}}
    dataset = ShardDataset(ShardIndex.open(index))
    with pytest.raises(ValueError, match="format"):
        dataset.shape(0)
    assert dataset.take(0).key == "s1"


def test_nothing_is_written_over_and_nothing_half(folder, index):
    before = index.read_bytes()
    with pytest.raises(ValueError, match=r"ends with \.jsonl"):
        write_index(folder, folder / "index.json")
    (folder / "mine.jsonl").write_text('{"caption": "a dot"}\n')
    with pytest.raises(ValueError, match="no index file"):
        write_index(folder, folder / "mine.jsonl")
    (folder / "sub" / "bad.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match=r"bad\.tar"):
        write_index([folder / "a.tar", folder / "sub"], index)
    assert index.read_bytes() == before and {path.suffix for path in folder.iterdir()} == {".tar", ".jsonl", ""}


# ---- hostile and damaged index files


def edited(index, change):
    """The index with `change` applied to the first shard's object."""
    lines = index.read_text().splitlines()
    shard = json.loads(lines[1])
    change(shard)
    index.write_text("\n".join([lines[0], json.dumps(shard), *lines[2:]]) + "\n")
    return index


@pytest.mark.parametrize(
    "name", ["../a.tar", "sub/../../a.tar", "", ".", "a//b.tar", "..\\a.tar", "pipe:touch x", "ssh://h/a.tar", "a::s3://b"]
)
def test_names_that_lead_elsewhere_are_refused(index, name):
    with pytest.raises(ValueError, match=r"all\.jsonl, line 2"):
        ShardIndex.open(edited(index, lambda shard: shard.update(name=name)))


@pytest.mark.parametrize("name", ["/etc/a.tar", "~/../a.tar", "memory://a.tar", "file:///etc/a.tar", "../a.tar"])
def test_an_index_from_elsewhere_names_no_file_of_this_machine(name):
    with pytest.raises(ValueError, match=r"index the shards again|no such URL"):
        beside("https://example.org/data/all.jsonl", name)
    assert beside("https://h/d/all.jsonl?key=1", "~/a.tar") == "https://h/d/~/a.tar?key=1"
    assert beside("s3://b/all.jsonl", "https://h/a.tar") == "https://h/a.tar"
    assert beside("/d/all.jsonl", "~/a.tar") == "/d/~/a.tar"


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard.pop("size"),
        lambda shard: shard.update(size=-1),
        lambda shard: shard.update(size=1e3),
        lambda shard: shard.update(size=100),
        lambda shard: shard.update(left_out=[]),
        lambda shard: shard.update(left_out={"x": "y"}),
        lambda shard: shard.update(samples={}),
        lambda shard: shard["samples"].append(shard["samples"][0]),
        lambda shard: shard["samples"].append(["key", {}]),
        lambda shard: shard["samples"][0][1].update(pkl=[0, 1]),
        lambda shard: shard["samples"][0][1].update(png=[-512, 10]),
        lambda shard: shard["samples"][0][1].update(png=[0, 2**40]),
        lambda shard: shard["samples"][0][1].update(png=[True, 1]),
        lambda shard: shard["samples"][0][1].update(png="x"),
        lambda shard: shard["samples"][0].__setitem__(2, [0, 4]),
        lambda shard: shard["samples"][0].__setitem__(2, [4, 2**40]),
        lambda shard: shard["samples"][0].__setitem__(3, None),
    ],
)
def test_entries_that_cannot_be_are_refused_with_their_line(index, change):
    with pytest.raises(ValueError, match=r"all\.jsonl, line 2: .*bitdance data index"):
        ShardIndex.open(edited(index, change))


def test_a_cut_or_foreign_index_file_is_refused(index):
    lines = index.read_text().splitlines(keepends=True)
    for text, where in (
        ("".join(lines[:-1]), "its end is missing"),
        ("".join(lines)[:-30], "line 3"),
        ("".join(lines[:2] + lines[3:]), "line 3: 1 shards are listed, not 2"),
        ("".join(lines[1:]), "line 1"),
        (lines[0].replace('"version":1', '"version":2'), "line 1"),
        ("[" * 200_000, "line 1"),
        ("", "its end is missing"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=where):
            ShardIndex.open(index)


def test_the_command_writes_an_index_that_inspect_reads(folder, capsys):
    out = folder / "all.jsonl"
    assert main(["index", str(folder / "a.tar"), str(folder / "sub"), "-o", str(out)]) == 0
    assert "7 samples in 2 shards" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "7 samples in 2 shards" in capsys.readouterr().out
    assert main(["index", str(folder / "none-*.tar"), "-o", str(out)]) == 2
    assert "no shard at" in capsys.readouterr().err
