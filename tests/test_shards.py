"""Shards are read by offset, and hostile members stay unread."""

import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from small_files import picture_bytes, write_tar
from torch.utils.data import DataLoader

from stages.data.bits import pack_bits, unpack_bits
from stages.data.files import MOST_OPEN, ChangedShard
from stages.data.order import EpochOrder
from stages.data.picture import BrokenPicture
from stages.data.shards import ShardDataset, ShardIndex
from stages.data.summary import summarise


def png(value: int) -> bytes:
    return picture_bytes(Image.new("RGB", (4, 4), (value % 256, value // 256, 7)))


def caption(text: str = "a dot") -> bytes:
    return json.dumps({"captions": [text, "dot"], "attributes": {"concept": text}}).encode()


def numbered(path, first, count):
    members = [
        (f"s{n}.{end}", png(n) if end == "png" else caption(f"dot {n}"))
        for n in range(first, first + count)
        for end in ("png", "json")
    ]
    return write_tar(path, members)


@pytest.fixture
def shards(tmp_path):
    for number, (first, count) in enumerate([(0, 30), (30, 17), (47, 3)]):
        numbered(tmp_path / f"dots-{number:06d}.tar", first, count)
    return tmp_path


def keys(samples):
    return [sample.key for sample in samples]


def test_every_sample_is_found_and_read_from_its_place(shards):
    dataset = ShardDataset(ShardIndex.open(shards))
    assert len(dataset) == 50
    for number in (49, 0, 31, 30, 29):
        sample = dataset[number]
        assert sample.key == f"s{number}"
        assert sample.picture.getpixel((0, 0)) == (number, 0, 7)
        assert sample.captions == [f"dot {number}", "dot"] and sample.attributes == {"concept": f"dot {number}"}
        assert sample.bits_Chw is None
    with pytest.raises(IndexError):
        dataset[50]


def test_a_folder_a_pattern_and_a_list_are_the_same_index(shards):
    whole = ShardIndex.open(shards)
    assert ShardIndex.open(str(shards / "dots-*.tar")).hash == whole.hash
    assert ShardIndex.open([shards / f"dots-{n:06d}.tar" for n in range(3)]).hash == whole.hash
    assert ShardIndex.open([shards / "dots-000001.tar"]).hash != whole.hash


def test_the_hash_follows_the_content_and_not_the_folder(shards, tmp_path_factory):
    before = ShardIndex.open(shards).hash
    moved = tmp_path_factory.mktemp("elsewhere")
    for path in shards.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert ShardIndex.open(moved).hash == before
    numbered(moved / "dots-000002.tar", 47, 4)
    assert ShardIndex.open(moved).hash != before


def test_webdataset_reads_the_same_samples(shards):
    import webdataset

    stream = webdataset.WebDataset(str(shards / "dots-000001.tar"), shardshuffle=False)
    theirs = [(sample["__key__"], sample["png"], sample["json"]) for sample in stream]
    dataset = ShardDataset(ShardIndex.open(shards / "dots-000001.tar"))
    whole = (shards / "dots-000001.tar").read_bytes()

    def cut(place):
        return whole[place[0] : sum(place)]

    ours = [(e.key, cut(e.members["png"]), cut(e.members["json"])) for e in dataset.index.entries]
    assert ours == theirs


# ---- hostile and broken shards


def test_a_pickle_member_is_neither_read_nor_run(tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    hostile = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
    endings = ("pkl", "pyd", "pth", "pickle", "npy", "png.pkl")
    path = write_tar(tmp_path / "x.tar", [("a.png", png(1)), *((f"a.{end}", hostile) for end in endings), ("a.json", caption())])
    index = ShardIndex.open(path)
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: read.append(pread(handle, size, offset)) or read[-1])
    sample = ShardDataset(index)[0]
    assert sample.key == "a" and set(index.entries[0].members) == {"png", "json"}
    assert index.left_out == {"member with another ending": len(endings)}
    assert len(read) == 2 and not any(hostile in data for data in read) and not trap.exists()


@pytest.mark.parametrize(
    "place",
    [
        "pipe:touch /nowhere",
        "pipe://touch",
        "ssh://host/a.tar",
        "github://org:repo@main/a.tar",
        "simplecache::s3://bucket/a.tar",
        "https://host/a.zip::memory://x",
        "s3:a.tar",
        "file:/a.tar",
        "data:,",
        "python://x",
    ],
)
def test_commands_and_unknown_urls_are_refused(place):
    with pytest.raises(ValueError, match="no such URL and no command"):
        ShardIndex.open([place])


def test_links_folders_and_devices_are_left_out(tmp_path):
    def special(name, kind, target=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return name, info

    path = write_tar(
        tmp_path / "x.tar",
        [
            ("a.png", png(1)),
            ("a.json", caption()),
            special("b.png", tarfile.SYMTYPE, "/etc/passwd"),
            special("c.png", tarfile.LNKTYPE, "a.png"),
            special("d.png", tarfile.FIFOTYPE),
            special("e.png", tarfile.DIRTYPE),
        ],
    )
    index = ShardIndex.open(path)
    assert [entry.key for entry in index.entries] == ["a"]
    assert index.left_out == {"member that is no regular file": 3, "folder member": 1}


def test_incomplete_samples_are_counted(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("a.png", png(1)),
            ("b.json", caption()),
            ("c.JPG", png(2)),
            ("c.txt", b"a dot\n"),
            ("c.txt", b"again"),
            ("d.txt", b"x"),
        ],
    )
    index = ShardIndex.open(path)
    assert [entry.key for entry in index.entries] == ["c"]
    assert index.left_out == {
        "sample without caption": 1,
        "sample without picture or bits": 2,
        "second member of the same name": 1,
    }
    assert ShardDataset(index)[0].captions == ["a dot"]


def test_a_member_above_the_limit_is_left_out(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [("a.png", png(1)), ("a.json", b" " * (2**20 + 1)), ("b.png", png(1)), ("b.json", caption())],
    )
    index = ShardIndex.open(path)
    assert [entry.key for entry in index.entries] == ["b"]
    assert index.left_out["member above the size limit"] == 1


def test_a_truncated_shard_keeps_its_whole_samples(shards):
    path = shards / "dots-000000.tar"
    data = path.read_bytes()
    place = ShardIndex.open(path).entries[20].members["png"][0]
    for cut in (place + 10, place - 100, place - 512):
        path.write_bytes(data[:cut])
        index = ShardIndex.open(path)
        assert len(index) == 20
        assert keys(ShardDataset(index)[n] for n in range(20)) == [f"s{n}" for n in range(20)]
    path.write_bytes(data[: place + 10])
    assert ShardIndex.open(path).left_out["truncated member"] == 1


def test_foreign_files_are_refused_with_their_name(tmp_path):
    (tmp_path / "noise.tar").write_bytes(bytes(range(256)) * 10)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    for name in ("noise.tar", "packed.tar"):
        with pytest.raises(ValueError, match=name):
            ShardIndex.open(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        ShardIndex.open(tmp_path / "missing-*.tar")
    with pytest.raises(ValueError, match="no usable sample"):
        ShardIndex.open(write_tar(tmp_path / "empty.tar", []))


def test_damaged_headers_raise_nothing_but_our_errors(shards):
    path = shards / "dots-000002.tar"
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    draw = np.random.default_rng(0)
    for _ in range(150):
        data = whole.copy()
        header = 512 * draw.integers(0, 4)
        data[header + draw.integers(0, 512, 4)] = draw.integers(0, 256, 4)
        path.write_bytes(data.tobytes())
        try:
            dataset = ShardDataset(ShardIndex.open(path))
            for number in range(len(dataset)):
                dataset[number]
        except ValueError:
            pass


def test_a_size_below_zero_does_not_loop(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.json", caption()), ("b.png", png(2)), ("b.json", caption())])
    data = bytearray(path.read_bytes())
    start = 512 * 4
    assert data[start : start + 5] == b"b.png"
    data[start + 124 : start + 136] = b"\xff" * 11 + b"\x00"  # base 256, negative
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    assert [entry.key for entry in ShardIndex.open(path).entries] == ["a"]


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"captions": [3]}', b'{"captions": []}', b'{"captions": {}}', b"[" * 200_000])
def test_a_bad_caption_names_its_sample(tmp_path, text):
    path = write_tar(tmp_path / "x.tar", [("odd.png", png(1)), ("odd.json", text)])
    with pytest.raises(ValueError) as caught:
        ShardDataset(ShardIndex.open(path))[0]
    assert "odd" in " ".join(caught.value.__notes__) and "x.tar" in " ".join(caught.value.__notes__)


def test_a_bad_picture_names_its_sample(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("odd.png", png(1)[:40]), ("odd.json", caption())])
    with pytest.raises(BrokenPicture) as caught:
        ShardDataset(ShardIndex.open(path))[0]
    assert "odd" in caught.value.__notes__[0]


def test_a_shard_that_shrinks_later_is_noticed(shards):
    index = ShardIndex.open(shards / "dots-000000.tar")
    os.truncate(shards / "dots-000000.tar", 2000)
    for read in (ShardDataset(index).__getitem__, ShardDataset(index).take):
        with pytest.raises(ChangedShard, match="changed after it was indexed"):
            read(20)


def test_many_shards_need_few_open_files(tmp_path):
    for number in range(40):
        numbered(tmp_path / f"d-{number:06d}.tar", number, 1)
    dataset = ShardDataset(ShardIndex.open(tmp_path))
    assert keys(dataset[n] for n in [*range(40), 0]) == [*(f"s{n}" for n in range(40)), "s0"]
    assert len(dataset._files._files) <= MOST_OPEN
    dataset.close()
    assert dataset[3].key == "s3"


# ---- loader workers


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_after_forty_batches_the_next_eight_are_the_same(shards, workers):
    index = ShardIndex.open(shards)

    def batches(first, last, workers):
        order = EpochOrder(len(index), seed=11)
        plan = [[order.at(slot) for slot in range(3 * step, 3 * step + 3)] for step in range(first, last)]
        return list(DataLoader(ShardDataset(index), batch_sampler=plan, num_workers=workers, collate_fn=list))

    uninterrupted = batches(0, 48, 0)
    resumed = batches(40, 48, workers)
    assert [keys(batch) for batch in resumed] == [keys(batch) for batch in uninterrupted[40:]]
    for ours, theirs in zip(resumed, uninterrupted[40:], strict=True):
        assert [a.picture.tobytes() for a in ours] == [b.picture.tobytes() for b in theirs]


def test_a_copy_for_another_process_opens_its_own_files(shards):
    dataset = ShardDataset(ShardIndex.open(shards))
    dataset[0]
    twin = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert twin[1].key == "s1"


# ---- bits


def test_bits_round_trip_for_every_byte():
    bits = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)).astype(np.int8) * 2 - 1).reshape(32, 8, 8)
    data = pack_bits(bits)
    assert data[11:] == bytes(range(256))
    assert unpack_bits(data).dtype == torch.int8 and torch.equal(unpack_bits(data), bits)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (32, 4, 6), (7, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_bits_round_trip_for_odd_shapes(shape, dtype):
    bits = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    back = unpack_bits(pack_bits(bits.to(dtype)))
    assert back.shape == shape and torch.equal(back, bits.to(torch.int8))


def test_bits_refuse_what_is_not_bits():
    for bad in (torch.zeros(1, 2, 2), torch.full((1, 2, 2), float("nan")), torch.ones(2, 2), torch.ones(0, 2, 2)):
        with pytest.raises(ValueError):
            pack_bits(bad)


def test_damaged_bits_are_refused():
    data = pack_bits(torch.ones(3, 3, 3))
    for bad in (
        b"",
        data[:4],
        data[:10],
        data[:-1],
        data + b"\0",
        b"BITS2" + data[5:],
        data[:-1] + b"\xff",
        data[:5] + bytes(6),
    ):
        with pytest.raises(ValueError):
            unpack_bits(bad)


def test_bits_members_come_with_or_without_a_picture(tmp_path):
    bits = torch.ones(4, 2, 3, dtype=torch.int8)
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("a.bits", pack_bits(bits)),
            ("a.json", caption()),
            ("b.bits", pack_bits(-bits)),
            ("b.txt", b"b"),
            ("b.png", png(9)),
        ],
    )
    dataset = ShardDataset(ShardIndex.open(path))
    assert dataset[0].picture is None and torch.equal(dataset[0].bits_Chw, bits)
    assert dataset[1].picture.size == (4, 4) and torch.equal(dataset[1].bits_Chw, -bits)


def test_the_summary_counts(shards):
    summary = summarise(ShardIndex.open(shards), examples=4)
    assert (summary["samples"], summary["captions"], summary["distinct"]["concept"]) == (50, 100, 50)
    assert [example["key"] for example in summary["examples"]] == ["s0", "s12", "s25", "s37"]
    assert json.loads(json.dumps(summary)) == summary


def test_training_skips_what_cannot_be_read_counts_it_and_stops_above_the_limit(tmp_path):
    bad = {5: b"no picture", 6: picture_bytes(Image.new("1", (9000, 9000))), 7: png(7)[:40]}
    members = [(f"s{n}.{end}", bad.get(n, png(n)) if end == "png" else caption()) for n in range(40) for end in ("png", "json")]
    data = ShardDataset(ShardIndex.open(write_tar(tmp_path / "some-bad.tar", members)))
    assert data.take(4).key == "s4" and not data.broken
    assert data.take(5).key == "s8"  # the next one that can be read
    assert set(data.broken) == {"s5", "s6", "s7"}
    assert data.take(6).key == "s8" and len(data.broken) == 3  # the same answer again, counted once
    assert data.key(6) == "s6"  # what cannot be read can still be named

    members = [(f"s{n}.{end}", b"" if end == "png" and n < 15 else caption() if end == "json" else png(n))
               for n in range(40) for end in ("png", "json")]  # fmt: skip
    rotten = ShardDataset(ShardIndex.open(write_tar(tmp_path / "rotten.tar", members)))
    with pytest.raises(ValueError, match=r"11 of 40 samples cannot be read, more than 10: s0: .*Pack them again"):
        rotten.take(0)
