"""One way to read a caption: the same bytes give the same captions, or the same refusal, through every door."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_files import picture_bytes, write_samples

from bitdance.jobs.prompt_file import PromptFile
from lfq_tokenizer import limits
from stages.data.caption_text import BrokenCaption, captions_of_record, captions_of_text, captions_of_value
from stages.data.folder import FolderOptions, FolderSource
from stages.data.sample import CaptionedPicture
from stages.data.shards import ShardDataset, ShardIndex
from stages.recipes.tokenizer.input import TokenizerInput

PNG = picture_bytes(Image.new("RGB", (16, 16), "red"))
Found = list[str] | str  # captions, or the reason for there being none
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> ShardDataset:
    write_samples(path, {key: {"png": PNG, **members} for key, members in samples.items()})
    return ShardDataset(ShardIndex.open(path))


def in_shard(folder: Path, **members: bytes) -> Found:
    try:
        return shard(folder / "a.tar", {"a": members})[0].captions
    except BrokenCaption as error:
        return error.reason


def in_folder(folder: Path, table: str | None = None) -> Found:
    (item,) = FolderSource(folder, FolderOptions(table=table))
    return item.captions if isinstance(item, CaptionedPicture) else item.reason


def encoded(folder: Path) -> Found:
    """As `bitdance tokenizer encode` reads it, which trains the unconditional prompt where there is no caption."""
    (item,) = TokenizerInput([folder]).samples(lambda sample: "")
    captions = getattr(item, "captions", None)
    return getattr(item, "reason", "") if captions is None else "no caption" if captions == [""] else captions


PIECES = ["a fox", "b", "é", "🦊", " ", "\t", "\u2028", "\x85", "\x0b", "\ufeff", "\n", "\r", "\r\n", "\0", "{", "#", '"', ","]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
HALVES = st.text(st.characters(categories=["Cs", "Ll"]), max_size=4)  # with lone surrogates
BYTES = st.one_of(
    TEXTS.map(str.encode), TEXTS.map(lambda t: b"\xef\xbb\xbf" + t.encode()), TEXTS.map(lambda t: t.encode("utf-16")),
    TEXTS.map(lambda t: t.encode("utf-16-le")), TEXTS.map(lambda t: t.encode("latin-1", "replace")), st.binary(max_size=12),
)  # fmt: skip


@SETTINGS
@given(data=BYTES)
def test_a_txt_means_the_same_in_a_folder_and_in_a_shard(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "in").mkdir()
    (folder / "in" / "a.png").write_bytes(PNG)
    (folder / "in" / "a.txt").write_bytes(data)
    found = in_folder(folder / "in")
    assert found == in_shard(folder, txt=data) == encoded(folder / "in")
    assert found == in_shard(folder, txt=data, json=b'{"caption": null, "url": "x"}')
    try:
        assert found == (captions_of_text(data, "a.txt") or "no caption")
    except BrokenCaption as error:
        assert found == error.reason


@SETTINGS
@given(data=BYTES)
def test_a_file_of_prompts_gives_the_lines_that_a_txt_gives(data: bytes) -> None:
    try:
        captions: Found = captions_of_text(data, "a.txt")
    except BrokenCaption as error:
        captions = error.reason
    try:
        prompts = [request.prompt for request in PromptFile("p.txt", io.BytesIO(data))]
    except ValueError as error:
        if "not UTF-8" in str(error) or "UTF-16" in str(error):
            assert captions == "captions are not UTF-8"
        return
    if "\0" not in "".join(prompts):
        bare = [prompt.removeprefix("\ufeff").strip() for prompt in prompts]
        assert captions == [prompt for prompt in bare if prompt]


@SETTINGS
@given(text=st.one_of(TEXTS, st.text(max_size=6), HALVES), listed=st.booleans())
def test_a_text_means_the_same_in_json_and_in_every_table(
    tmp_path_factory: pytest.TempPathFactory, text: str, listed: bool
) -> None:
    folder = tmp_path_factory.mktemp("value")
    (folder / "in").mkdir()
    (folder / "in" / "a.png").write_bytes(PNG)
    value = [text, None, " "] if listed else text
    name = "captions" if listed else "caption"
    found = in_shard(folder, json=json.dumps({name: value}).encode())
    (folder / "in" / "t.jsonl").write_text(json.dumps({"file": "a.png", name: value}) + "\n")
    assert in_folder(folder / "in", "t.jsonl") == found
    try:
        with open(folder / "in" / "t.csv", "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([["file", "caption"], ["a.png", text]])
    except UnicodeEncodeError:
        if json.loads(json.dumps(text)) == text:  # else two halves of a pair, which are one letter in JSON
            assert found == "caption is no valid text"
        return
    if "\0" not in text:  # of which a CSV file knows nothing
        assert in_folder(folder / "in", "t.csv") == found


BLANK = (None, "", " \n", [], [None], ["", " "])


def test_what_a_value_may_be() -> None:
    for value, captions in ((" a\n", ["a"]), (["a", None, " b "], ["a", "b"]), *((blank, []) for blank in BLANK)):
        assert captions_of_value(value, "x") == captions
    assert captions_of_value([""], "x") == [""]  # on purpose without words
    for value in (3, True, {"en": "a"}, ["a", 3], [["a"]]):
        with pytest.raises(BrokenCaption, match="x: captions must be"):
            captions_of_value(value, "x")
    assert captions_of_record({"captions": [], "caption": "a fox"}, "x") == ["a fox"]


@pytest.mark.parametrize("blank", [*BLANK, [""]])
@pytest.mark.parametrize("name", ["caption", "captions", "url"])
def test_a_txt_stands_in_where_json_has_no_caption(tmp_path: Path, name: str, blank: object) -> None:
    found = in_shard(tmp_path, json=json.dumps({name: blank}).encode(), txt=b"\xef\xbb\xbfa fox\r\ran owl")
    assert found == ["a fox", "an owl"]
    assert in_shard(tmp_path, json=b'{"caption": "first"}', txt=b"second") == ["first"]


def test_metadata_as_crawlers_write_it_is_read(tmp_path: Path) -> None:
    data = shard(tmp_path / "a.tar", {"a": {"json": b'\xef\xbb\xbf{"caption": "a", "similarity": NaN, "attributes": null}'}})
    assert data.caption(0) == (["a"], {})
    for text, reason in (
        (b'{"caption": "a", "caption": "b"}', "given twice"),
        (b'{"caption": "a", "n": 1' + b"0" * 5000 + b"}", "too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        ('{"caption": "a"}'.encode("utf-16"), "UTF-8"),
    ):
        with pytest.raises(BrokenCaption, match=reason):
            shard(tmp_path / "b.tar", {"a": {"json": text}})[0]


def test_captions_beyond_the_limit_cost_their_picture_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_bytes(b"x" * (limits.CAPTION_BYTES + 1))
    assert in_folder(tmp_path) == encoded(tmp_path) == "captions too long"


def test_a_caption_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "a.txt")
    assert in_folder(tmp_path) == encoded(tmp_path) == "caption cannot be read"


# ---- tables


def table(folder: Path, name: str, data: bytes) -> dict[str, list[str]]:
    for picture in ("red.png", "green.png"):
        (folder / picture).write_bytes(PNG)
    (folder / name).write_bytes(data)
    items = FolderSource(folder, FolderOptions(table=name))
    return {item.attributes["file"]: item.captions for item in items if isinstance(item, CaptionedPicture)}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tables_end_their_lines_as_they_like(tmp_path: Path, end: bytes, mark: bytes) -> None:
    rows = [b"file,caption", b"red.png,one", b"", b"green.png,two", b"./red.png,three", b"red.png,one"]
    expected = {"red.png": ["one", "three"], "green.png": ["two"]}
    assert table(tmp_path, "t.csv", mark + end.join(rows) + end) == expected
    rows = [json.dumps(dict(zip(("file", "caption"), row.decode().split(",")))).encode() for row in rows[1:] if row]
    assert table(tmp_path, "t.jsonl", mark + end.join(rows)) == expected


def test_several_rows_of_a_picture_are_its_captions_and_keep_their_attributes(tmp_path: Path) -> None:
    data = b"file,caption,id,split,width\nred.png,one,1,a,640\ngreen.png,x,2,a,1\nred.png,two,3,a,640\n"
    table(tmp_path, "t.csv", data)
    red, _ = FolderSource(tmp_path, FolderOptions(table="t.csv"))
    assert isinstance(red, CaptionedPicture) and red.captions == ["one", "two"]
    assert red.attributes == {"file": "red.png", "id": ["1", "3"], "split": "a", "original_width": "640"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"file,caption\nred.png,a disc, red\n", r"t\.csv, row 1 \(line 2\): 3 fields where the header has 2"),
        ("t.csv", b'file,caption\nred.png,a\ngreen.png,"open\nx,y\n', r"t\.csv, row 2 \(line 3\): .*quote left open"),
        ("t.csv", b'file,caption\nred.png,"a" b\n', r"t\.csv, row 1 \(line 2\): no readable CSV"),
        ("t.csv", b"file,caption,caption\nred.png,a,b\n", r"column 'caption' is there twice"),
        ("t.csv", b"file;caption\nred.png;a\n", r"row 1: no column `file`; found file;caption"),
        ("t.csv", b"file,caption\nred.png,caf\xe9\n", r"t\.csv, line 2: not UTF-8 \(byte 0xe9 at position 24\)"),
        ("t.csv", b"\xef\xbb\xbffile,caption\rred.png,a\rx,caf\xe9\r", r"t\.csv, line 3: not UTF-8 \(byte 0xe9 at position 31\)"),
        ("t.csv", b"\xef\xbb\xbffile,\xe9\n", r"t\.csv, line 1: not UTF-8 \(byte 0xe9 at position 8\)"),
        ("t.csv", "file,caption\n".encode("utf-16"), r"t\.csv: UTF-16 text"),
        ("t.jsonl", b'{"file": "red.png", "caption": "caf\xe9"}', r"t\.jsonl, line 1: not UTF-8"),
        ("t.jsonl", b'\n{"file": "red.png"\n', r"t\.jsonl, line 2: not valid JSON"),
        ("t.jsonl", b"[" * 100_000, r"t\.jsonl, line 1: nested too deeply"),
        ("t.jsonl", b'{"file": "red.png", "caption": ["a", 3]}', r"t\.jsonl, row 1: captions must be"),
    ],
)
def test_a_table_with_a_mistake_is_refused_with_its_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(tmp_path, name, data)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_row_beyond_the_limit_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TABLE_ROW_BYTES", 10_000)
    head = b"file,caption\n" if name == "t.csv" else b""
    for row in (b"x" * 50_000, b'"' + b"x\n" * 50_000, b'"x\n",' * 50_000):
        with pytest.raises(ValueError, match=rf"{name}, line \d: (a row of more than 10\.0 kB|not valid JSON)"):
            table(tmp_path, name, head + row)


def test_half_a_character_in_a_table_costs_its_picture_only(tmp_path: Path) -> None:
    data = b'{"file": "red.png", "caption": "a \\ud83d"}\n{"file": "green.png", "caption": "two"}\n'
    assert table(tmp_path, "t.jsonl", data) == {"green.png": ["two"]}
    (red, _) = FolderSource(tmp_path, FolderOptions(table="t.jsonl"))
    assert getattr(red, "reason", "") == "caption is no valid text"
    data = b'{"file": "\\ud83d.png", "caption": "a"}\n{"file": "green.png", "caption": "two"}\n'
    assert table(tmp_path, "t.jsonl", data) == {"green.png": ["two"]}
