"""Shards behind URLs are the same shards, whatever the server does; what cannot be reached is an error and no bad sample."""

import functools
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from PIL import Image
from small_files import picture_bytes, tar_bytes
from torch.utils.data import DataLoader

from stages.data import files
from stages.data.files import ChangedShard, RemoteError
from stages.data.index_file import write_index
from stages.data.metadata import Shape
from stages.data.shards import ShardDataset, ShardIndex


def shard(first, count):
    members = []
    for n in range(first, first + count):
        text = json.dumps({"captions": [f"dot {n}"], "attributes": {"n": n}}).encode()
        members += [(f"s{n}.png", picture_bytes(Image.new("RGB", (4, 3), (n, 0, 7)))), (f"s{n}.json", text)]
    return tar_bytes(members)


SHARDS = {f"dots-{n:03d}.tar": shard(first, count) for n, (first, count) in enumerate([(0, 9), (9, 5), (14, 6)])}


class Server(ThreadingHTTPServer):
    """`/MODE/NAME` gives a shard the way that the mode says; `served` counts requests by mode and method."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = dict(SHARDS)
        self.served = Counter()

    def url(self, mode, name="dots-000.tar"):
        return f"http://127.0.0.1:{self.server_port}/{mode}/{name}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        _, mode, name = self.path.split("?")[0].split("/")
        self.server.served[mode, self.command] += 1
        count = self.server.served[mode, self.command]
        data = self.server.files.get(name)
        if data is None or mode == "forbidden":
            return self.answer(404 if data is None else 403, b"")
        if mode == "failing" or (mode == "flaky" and count % 2):
            return self.answer(503, b"")
        if mode == "larger" and self.command == "HEAD":
            data = data + bytes(512)
        asked = self.headers.get("Range")
        if asked is None or mode == "whole":
            return self.answer(200, data)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self.answer(416, b"")
        part = data[first : last + 1] + (b"more" if mode == "generous" else b"")
        cut = mode == "breaking" or (mode == "stumbling" and count % 2 == 1)
        self.answer(206, part, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, cut)

    do_HEAD = do_GET

    def answer(self, status, body, headers={}, cut=False):  # noqa: B006
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0))
    with Server() as running:
        thread = threading.Thread(target=functools.partial(running.serve_forever, poll_interval=0.01), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "local"
    folder.mkdir()
    for name, data in SHARDS.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    for name, data in SHARDS.items():
        store.pipe(f"/dots/{name}", data)
    yield store
    store.rm("/dots", recursive=True)


def read(data):
    return [(s.key, s.captions, s.attributes, s.picture.tobytes()) for s in (data[n] for n in range(len(data)))]


def test_a_url_gives_the_same_samples_as_the_files(server, local, memory):
    index = ShardIndex.open(local)
    samples = read(ShardDataset(index))
    for place in (
        server.url("ok", "dots-{000..002}.tar"),
        [server.url("ok", f"dots-00{n}.tar?signature=a%2Fb") for n in range(3)],
        "memory://dots",
        "memory://dots/*.tar",
        "memory://dots/dots-00[0-2].tar",
        ["memory://dots/dots-00{0,1}.tar", "memory://dots/dots-002.tar"],
        f"file://{local}",
        str(local / "dots-{000..002}.tar"),
    ):
        remote = ShardIndex.open(place)
        assert (remote.hash, remote.left_out) == (index.hash, index.left_out), place
        data = ShardDataset(remote)
        assert read(data) == samples, place
        assert data.shape(3) == Shape(3, 4)
        data.close()


def test_a_sample_costs_one_request(server):
    data = ShardDataset(ShardIndex.open(server.url("ok")))
    data[0]
    before = server.served["ok", "GET"]
    data[5], data[2]
    assert server.served["ok", "GET"] == before + 2


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_open_their_own_connections(server, workers):
    data = ShardDataset(ShardIndex.open(server.url("ok", "dots-{000..002}.tar")))
    assert data[0].key == "s0"  # a connection of the parent, which the workers must leave alone
    for _ in range(2):
        loaded = DataLoader(data, sampler=range(20), batch_size=None, num_workers=workers)
        assert [sample.key for sample in loaded] == [f"s{n}" for n in range(20)]
        assert data[19].key == "s19"


@pytest.mark.parametrize("mode", ["flaky", "stumbling"])
def test_passing_failures_are_tried_again(server, mode):
    data = ShardDataset(ShardIndex.open(server.url(mode)))
    assert [data.take(n).key for n in range(9)] == [f"s{n}" for n in range(9)] and not data.broken


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("failing", "the server answers 503"),
        ("forbidden", "the server answers 403"),
        ("breaking", "cannot be read"),
        ("generous", "bytes came instead of"),
    ],
)
def test_what_cannot_be_reached_names_its_url(server, mode, reason):
    with pytest.raises(RemoteError, match=reason) as caught:
        ShardIndex.open(server.url(mode) + "?signature=secret")
    assert f"/{mode}/dots-000.tar" in str(caught.value) and "secret" not in str(caught.value)


def test_a_missing_file_is_asked_for_once(server):
    with pytest.raises(RemoteError, match=r"absent\.tar cannot be read: there is no such file"):
        ShardIndex.open(server.url("ok", "absent.tar"))
    assert server.served["ok", "HEAD"] == 1


def test_a_server_without_ranges_is_refused(server):
    with pytest.raises(RemoteError, match="answer range requests"):
        files.OpenFiles().read(server.url("whole"), len(SHARDS["dots-000.tar"]), 512, 100)


def test_a_server_that_lies_about_the_size_is_noticed(server):
    size = len(SHARDS["dots-000.tar"])
    with pytest.raises(RemoteError, match="100 bytes came instead of 300"):
        files.OpenFiles().read(server.url("larger"), size + 512, size - 100, 300)


def test_training_stops_and_skips_nothing_when_a_server_goes_away(server, monkeypatch):
    data = ShardDataset(ShardIndex.open(server.url("ok")))
    skipped = Counter()
    assert data.take(1, skipped).key == "s1"
    del server.files["dots-000.tar"]
    with pytest.raises(RemoteError, match="there is no such file"):
        data.take(2, skipped)
    assert not skipped and not data.broken


def test_a_bad_sample_behind_a_url_is_still_a_bad_sample(server):
    server.files["dots-000.tar"] = SHARDS["dots-000.tar"].replace(b"\x89PNG", b"\x89PIG", 2)
    data = ShardDataset(ShardIndex.open(server.url("ok")))
    skipped = Counter()
    assert data.take(0, skipped).key == "s2" and skipped == {"picture format": 2}


def test_a_shard_that_changed_behind_its_url_is_an_error(server):
    index = ShardIndex.open(server.url("ok"))
    server.files["dots-000.tar"] = SHARDS["dots-000.tar"][:-512]
    with pytest.raises(ChangedShard, match="was changed after it was indexed"):
        ShardDataset(index).take(0)


@pytest.mark.parametrize("pattern", ["dots-*.tar", ""])
def test_http_cannot_list(server, pattern):
    with pytest.raises(ValueError, match=r"write out the names, such as shard-\{000\.\.099\}\.tar"):
        ShardIndex.open(server.url("ok", pattern))


def test_places_that_match_nothing_are_named(memory):
    for place in ("memory://dots/none-*.tar", "memory://elsewhere"):
        with pytest.raises(FileNotFoundError, match=place.replace("*", r"\*")):
            ShardIndex.open(place)


def test_a_missing_package_says_what_to_install(monkeypatch):
    def without(url, **_):
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", without)
    with pytest.raises(ValueError, match=r"s3://bucket/a\.tar needs another package .*pip install fsspec s3fs"):
        ShardIndex.open("s3://key:secret@bucket/a.tar")


def test_an_index_file_lies_beside_its_shards_behind_a_url(server, local, memory):
    write_index(local, local / "all.jsonl")
    server.files["all.jsonl"] = (local / "all.jsonl").read_bytes()
    memory.pipe("/dots/all.jsonl", server.files["all.jsonl"])
    here = ShardIndex.open(local)
    for place in (server.url("ok", "all.jsonl?signature=a"), "memory://dots/all.jsonl"):
        index = ShardIndex.open(place, keep=["n >= 3"])
        assert index.left_out == {"condition n >= 3": 3}
        assert read(ShardDataset(index)) == read(ShardDataset(here))[3:]
    heads = server.served["ok", "HEAD"]
    assert heads == 1 + 3  # the index when it was opened, each shard when it was first read
    assert ShardIndex.open("memory://dots/all.jsonl").hash == here.hash


def test_shards_behind_urls_can_be_indexed_here(server, local, tmp_path):
    write_index(server.url("ok", "dots-{000..002}.tar"), tmp_path / "far.jsonl")
    index = ShardIndex.open(tmp_path / "far.jsonl")
    assert index.hash == ShardIndex.open(local).hash
    assert ShardDataset(index)[19].key == "s19"
