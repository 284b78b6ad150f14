"""Folders as people have them: other endings, hidden files, links, pipes, odd names. Nothing is dropped or taken in silence."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import stages.cli
from stages.data.cli import main
from stages.data.folder import FolderOptions, FolderSource
from stages.data.index_file import write_index
from stages.data.pack import pack
from stages.data.picture import ANIMATED
from stages.data.sample import CaptionedPicture, Skipped
from stages.data.shards import ShardDataset, ShardIndex
from stages.data.walk import listing
from stages.recipes.tokenizer.input import TokenizerInput

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.data.skipping._named", set())


def picture(path: Path, form: str | None = None, size: tuple[int, int] = (32, 24), text: str | None = "a field") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 8, 7)).save(path, format=form)
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    return path


def taken(folder: Path, **options: object) -> tuple[list[str], dict[str, str]]:
    """What `data pack folder` takes, and what it skips and why."""
    items = list(FolderSource(folder, FolderOptions(**options)))  # type: ignore[arg-type]
    good = [item.attributes["file"] for item in items if isinstance(item, CaptionedPicture)]
    return good, {item.name: item.reason for item in items if isinstance(item, Skipped)}


def encoded(folder: Path) -> list[str]:
    """What `tokenizer encode` takes."""
    return [item.attributes["file"] for item in TokenizerInput([folder]).samples(lambda _: "") if not isinstance(item, Skipped)]


ENDINGS = {"a.png": "PNG", "b.jfif": "JPEG", "c.JPE": "JPEG", "d.bmp": "BMP", "e.gif": "GIF", "f.avif": "AVIF", "g.TIF": "TIFF"}
ENDINGS |= {"h.tiff": "TIFF", "i.JPG": "JPEG", "j.WebP": "WEBP"}


def test_pictures_of_other_endings_are_read_in_folders_and_in_shards(tmp_path: Path) -> None:
    for name, form in ENDINGS.items():
        picture(tmp_path / "in" / name, form)
    assert taken(tmp_path / "in") == (list(ENDINGS), {}) and encoded(tmp_path / "in") == list(ENDINGS)
    pack(FolderSource(tmp_path / "in", FolderOptions(fit="none")), tmp_path / "out")
    with tarfile.open(tmp_path / "own.tar", "w") as archive:
        for name in sorted(os.listdir(tmp_path / "in")):
            archive.add(tmp_path / "in" / name, name)
    for shards in (tmp_path / "out", tmp_path / "own.tar"):
        data = ShardDataset(ShardIndex.open(shards))
        assert len(data) == len(ENDINGS) and data.index.left_out == {}
        assert {data[n].picture.size for n in range(len(data))} == {(32, 24)}
        assert {(data.shape(n).width, data.shape(n).height) for n in range(len(data))} == {(32, 24)}


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in/a.png")
    for name in ("photo.HEIC", "raw.cr2", "clip.mov", "lonely.heif", "notes.md", "orphan.txt", "Makefile"):
        (tmp_path / "in" / name).write_bytes(b"x")
    for name in ("photo", "raw", "clip"):
        (tmp_path / "in" / f"{name}.txt").write_text("a caption")
    good, skipped = taken(tmp_path / "in")
    assert good == ["a.png"] and skipped == {
        "photo.HEIC": "ending .heic is not read",
        "raw.cr2": "ending .cr2 is not read",
        "clip.mov": "ending .mov is not read",
        "lonely.heif": "ending .heif is not read",
    }
    assert main(["pack", "folder", str(tmp_path / "out"), str(tmp_path / "in")]) == 0
    out, err = capsys.readouterr()
    assert "1 ending .mov is not read" in out and all(err.count(name) == 1 for name in skipped)
    assert "1 .md files" in err and "1 .txt files" in err and "1 files without an ending" in err
    assert encoded(tmp_path / "in") == ["a.png"]


def test_what_systems_and_notebooks_leave_is_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "red.png")
    hidden = ("__MACOSX/._red.png", "._red.png", ".ipynb_checkpoints/red-checkpoint.png", ".git/x.png", "@eaDir/red.png/T.jpg")
    for name in hidden:
        picture(tmp_path / name, "PNG")
    for name in (".DS_Store", "Thumbs.db", "sub/desktop.ini"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xfe")
    assert taken(tmp_path) == (["red.png"], {}) and encoded(tmp_path) == ["red.png"]
    passed = listing(tmp_path).passed
    assert passed.keys() == {"hidden files and folders"} and passed.total() >= 8
    with tarfile.open(tmp_path / "mac.tar", "w") as archive:  # as tar on a Mac writes it
        for name in ("red.png", "red.txt", "._red.png", "__MACOSX/._red.txt", ".ipynb_checkpoints/red-checkpoint.png"):
            archive.add(tmp_path / name, f"./{name}")
    index = ShardIndex.open(tmp_path / "mac.tar")
    assert [entry.key for entry in index.entries] == ["./red"] and index.left_out == {"member of a hidden or system file": 3}


def test_captions_may_end_in_upper_case_and_names_may_be_no_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.PNG", text=None)
    (tmp_path / "a.TXT").write_text("upper")
    odd = os.fsdecode(b"caf\xe9")
    picture(tmp_path / f"{odd}.png", "PNG", text="odd")
    picture(tmp_path / "esc\x1b[2J.png", "PNG")
    items = [item for item in FolderSource(tmp_path) if isinstance(item, CaptionedPicture)]
    assert sorted(item.captions[0] for item in items) == ["a field", "odd", "upper"]
    assert "caf\\xe9.png" in [item.attributes["file"] for item in items]
    report = pack(FolderSource(tmp_path), tmp_path / "out")
    assert report["samples"] == 3 and len(encoded(tmp_path)) == 3
    keys = [entry.key for entry in ShardIndex.open(tmp_path / "out").entries]
    assert len(set(keys)) == 3 and all(key.isascii() for key in keys)


def test_nothing_behind_a_link_that_leads_out_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("TOPSECRET")
    picture(tmp_path / "elsewhere" / "x.png", text="TOPSECRET")
    folder = tmp_path / "in"
    picture(folder / "good.png")
    (folder / "inner.png").symlink_to("good.png")
    (folder / "inner.txt").symlink_to("good.txt")
    picture(folder / "text.png", text=None)
    (folder / "text.txt").symlink_to("../secret")
    (folder / "link.png").symlink_to("../elsewhere/x.png")
    (folder / "link.txt").symlink_to("../elsewhere/x.txt")
    (folder / "all").symlink_to("../elsewhere")
    (folder / "round.png").symlink_to("round.png")
    (folder / "round.txt").write_text("in a circle")
    (folder / "t.jsonl").symlink_to("../secret")
    outside = dict.fromkeys(("text.png", "link.png", "round.png"), "outside the folder")
    assert taken(folder) == (["good.png", "inner.png"], outside)
    assert listing(folder).passed["links to folders"] == 1
    for place in (folder, str(folder / "*.png")):
        items = list(TokenizerInput([place]).samples(lambda _: ""))
        assert {item.name: item.reason for item in items if isinstance(item, Skipped)} == outside
    with pytest.raises(FileNotFoundError, match="no such file inside"):
        FolderSource(folder, FolderOptions(table="t.jsonl"))
    pack(FolderSource(folder), tmp_path / "out")
    assert all(b"TOPSECRET" not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_pipes_and_devices_are_refused_and_never_waited_for(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "a.png").unlink()
    os.mkfifo(tmp_path / "in" / "a.png")
    assert taken(tmp_path / "in") == (["b.png"], {"a.png": "no regular file"}) and encoded(tmp_path / "in") == ["b.png"]
    for name in ("x.tar", "x.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is no regular file"):
            ShardIndex.open(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/zero is no regular file"):
        ShardIndex.open("/dev/zero")


def test_columns_of_a_size_do_not_override_the_size_of_the_pack(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png", size=(64, 48))
    (tmp_path / "in/t.jsonl").write_text('{"file": "a.png", "caption": "a", "width": 4000, "height": 3000}\n')
    pack(FolderSource(tmp_path / "in", FolderOptions(size=32, table="t.jsonl")), tmp_path / "out")
    data = ShardDataset(ShardIndex.open(tmp_path / "out", keep=["width == 32", "original_width == 4000"]))
    assert (data.shape(0).height, data.shape(0).width) == (32, 32)
    write_index(tmp_path / "out", tmp_path / "out" / "i.jsonl")
    data = ShardDataset(ShardIndex.open(tmp_path / "out" / "i.jsonl", keep=["height == 32"]))
    assert (data.shape(0).height, data.shape(0).width) == (32, 32)


def test_packing_says_what_became_of_the_sizes_and_of_animations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("a", (400, 300)), ("b", (40, 40)), ("c", (100, 100))):
        picture(tmp_path / "in" / f"{name}.png", size=size)
    frames = [Image.new("RGB", (70, 70), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "in/d.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "in/d.txt").write_text("two frames")
    for options, told in (
        ([], "pictures of 40×40 to 400×300 pixels became 64×64: 1 cropped to the middle square, 1 enlarged; --size N"),
        (["--fit", "pad"], "1 padded with white to a square, 1 enlarged"),
        (["--fit", "none"], "pictures of 40×40 to 400×300 pixels are kept as they are (--fit none)"),
    ):
        assert main(["pack", "folder", str(tmp_path / "out"), str(tmp_path / "in"), "--overwrite", *options]) == 0
        out, err = capsys.readouterr()
        assert told in out and f"1 {ANIMATED}" in err


def test_what_a_terminal_would_obey_is_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in/esc\x1b[2J.png", "PNG", text="a \x1b]0;title\x07 fox \u202e")
    (tmp_path / "in/bad\x9b1m.png").write_bytes(b"no")
    (tmp_path / "in/bad\x9b1m.txt").write_text("x")
    assert main(["pack", "folder", str(tmp_path / "out"), str(tmp_path / "in")]) == 0
    for arguments in ([str(tmp_path / "out")], [str(tmp_path / "out"), "--json"], ["no\x1b[2Jne.tar"]):
        main(["inspect", *arguments])
    shown = "".join(capsys.readouterr())
    assert "skipped bad\\x9b1m.png" in shown and "no\\x1b[2Jne.tar" in shown
    assert not any(character in shown for character in "\x1b\x07\x9b\u202e")


# ---- written whole, by the umask, or not at all


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664), (0o022, 0o755, 0o644)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, folder: int, file: int) -> None:
    picture(tmp_path / "in/a.png")
    before = os.umask(mask)
    try:
        pack(FolderSource(tmp_path / "in"), tmp_path / "out")
        write_index(tmp_path / "out", tmp_path / "i.jsonl")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder
    assert {path.stat().st_mode & 0o777 for path in (*(tmp_path / "out").iterdir(), tmp_path / "i.jsonl")} == {file}


def test_what_a_killed_command_left_is_removed_by_the_next(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    code = (
        "import os, signal, sys\n"
        "from stages.data import index_file, pack as packing\n"
        "from stages.data.folder import FolderSource\n"
        "kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[1] == 'pack': packing.sha256 = kill; packing.pack(FolderSource('in'), 'out')\n"
        "index_file.read_known = kill; index_file.write_index('done', 'i.jsonl')\n"
    )
    pack(FolderSource(tmp_path / "in"), tmp_path / "done")
    for what, name in (("pack", ".out.incomplete-"), ("index", ".i.jsonl.incomplete-")):
        child = subprocess.run(
            [sys.executable, "-c", code, what], cwd=tmp_path, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert child.returncode == -signal.SIGKILL
        assert [path for path in os.listdir(tmp_path) if path.startswith(name)]
    pack(FolderSource(tmp_path / "in"), tmp_path / "out")
    write_index(tmp_path / "done", tmp_path / "i.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["done", "i.jsonl", "in", "out"]


def test_a_full_disk_is_one_message_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of a file stands for the disk: both refuse a write."""
    for number in range(6):
        path = tmp_path / "in" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(path)
        path.with_suffix(".txt").write_text("noise")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code = main(["pack", "folder", str(tmp_path / "out"), str(tmp_path / "in")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path / 'out'} could not be written: the disk is full" in err
    assert os.listdir(tmp_path) == ["in"]


# ---- bounds of shards


def header(name: str, kind: bytes, size: int) -> bytes:
    """A tar header that announces any size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    block[156:157], block[124:136], block[148:156] = kind, b"\x80" + size.to_bytes(11, "big"), b" " * 8
    block[148:156] = f"{sum(block):06o}".encode() + b"\0 "
    return bytes(block)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
@pytest.mark.parametrize("size", [2**40, 2**31, 2**22])
def test_a_header_that_announces_terabytes_is_refused(tmp_path: Path, kind: bytes, size: int) -> None:
    (tmp_path / "s.tar").write_bytes(header("long", kind, size) + bytes(1024))
    with pytest.raises(ValueError, match=rf"s\.tar is not an uncompressed tar file \(a header announces {size} bytes"):
        ShardIndex.open(tmp_path / "s.tar")


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_headers_behind_headers_without_end_are_refused(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "s.tar").write_bytes((header("long", kind, 4) + b"abcd" + bytes(508)) * 5000 + bytes(1024))
    with pytest.raises(ValueError, match=r"s\.tar"):
        ShardIndex.open(tmp_path / "s.tar")


@pytest.mark.parametrize(
    "pattern",
    ["s-{0..99999999999}.tar", "s-{0..999999}{0..999999}.tar", "{{0..999999}{0..999999},x}.tar", "s-{" + "9" * 5000 + "..0}.tar"]
    + ["{a,b}" * 40 + ".tar", "https://example.org/{0..99999999999}.tar", "{0..99999999999..3}.tar"],
)
def test_braces_for_more_names_than_anyone_has_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="braces stand for more than 1,000,000 names"):
        ShardIndex.open(pattern)


def test_an_index_of_endless_lines_is_neither_written_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        picture(tmp_path / "in" / f"{number}.png")
    pack(FolderSource(tmp_path / "in"), tmp_path / "out")
    write_index(tmp_path / "out", tmp_path / "i.jsonl")
    monkeypatch.setattr("lfq_tokenizer.limits.INDEX_LINE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"i\.jsonl, line 2: a line of more than 1\.0 kB"):
        ShardIndex.open(tmp_path / "i.jsonl")
    with pytest.raises(ValueError, match=r"the index of .*out-000000\.tar is too long"):
        write_index(tmp_path / "out", tmp_path / "j.jsonl")
    assert not (tmp_path / "j.jsonl").exists()


# ---- the door of the commands


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'webdataset'", name="webdataset"), "package webdataset, .*bitdance[train]"),
        (ModuleNotFoundError("No module named 'matplotlib.x'", name="matplotlib.x"), "matplotlib, .*bitdance[compare]"),
        (ImportError("SVG; `pip install resvg-py` renders them"), "SVG; `pip install resvg-py` renders them"),
        (MemoryError(), "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (ValueError("two\nlines \x1b[2J"), "two lines \\x1b[2J"),
        (OSError(errno.EACCES, "Permission denied", "x.tar"), "[Errno 13] Permission denied: 'x.tar'"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def body(_: list[str]) -> int:
        raise error

    assert stages.cli.guarded("bitdance x", body, []) == 2
    err = capsys.readouterr().err
    assert err.startswith("bitdance x: error: ") and err.count("\n") == 1
    assert all(part in err for part in message.split(".*"))


def test_a_command_that_is_stopped_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Under every name that it is started by, `python -m stages.…` too."""

    def body(_: list[str]) -> int:
        raise KeyboardInterrupt

    assert stages.cli.guarded("python -m stages.x", body, []) == 130
    assert capsys.readouterr().err == "python -m stages.x: stopped: SIGINT\n"


def test_a_broken_weight_file_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    assert stages.cli.guarded("bitdance x", lambda _: len(load_file(tmp_path / "x.safetensors")), []) == 2
    assert "bitdance x: error: " in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("ours"), ModuleNotFoundError("No module named 'stages.x'", name="stages.x")])
def test_our_own_mistakes_are_not_hidden(error: Exception) -> None:
    def body(_: list[str]) -> int:
        raise error

    with pytest.raises(type(error)):
        stages.cli.guarded("bitdance x", body, [])


def test_without_the_package_that_writes_shards_its_extra_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in/a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "webdataset", None)
        assert main(["pack", "folder", str(tmp_path / "out"), str(tmp_path / "in")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'bitdance[train]'" in err and os.listdir(tmp_path) == ["in"]


def test_a_reader_that_has_gone_is_no_mistake(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    pack(FolderSource(tmp_path / "in"), tmp_path / "out")
    code = "import sys; from stages.data.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (child.returncode, child.stderr) == (0, b"")
