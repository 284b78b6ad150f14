"""Files are whole or absent, follow the umask, go through no link; one process at a time; JSON of strangers is bounded."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lfq_tokenizer import limits
from lfq_tokenizer.files import (
    DiskFull,
    check_room,
    clear_leftovers,
    inside,
    size_text,
    temporary_beside,
    whole_file,
    whole_folder,
    write_text,
)
from lfq_tokenizer.json_file import parse_json, read_json
from lfq_tokenizer.lock import FolderLock, Locked
from lfq_tokenizer.text import check_unicode, decoded, printable, text_lines
from lfq_tokenizer.weights import write_safetensors


def child(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_file_is_the_old_one_until_it_is_the_whole_new_one(tmp_path):
    path = tmp_path / "a.txt"
    write_text("old", path)
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text("x", tmp_path / "t")
        write_safetensors({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("t", "w.safetensors")} == {mode}
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_no_link_is_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("t", "t.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_text("x", tmp_path / "t")
    assert victim.read_text() == "mine" and (tmp_path / "t").read_text() == "x" and not (tmp_path / "t").is_symlink()
    names = {temporary_beside(tmp_path / "t").name for _ in range(50)}
    assert len(names) == 50  # nobody can foresee one


def test_a_folder_is_replaced_at_one_blow(tmp_path, monkeypatch):
    target = tmp_path / "pack"
    for content in ("one", "two"):
        with whole_folder(target) as folder:
            write_text(content, folder / "f")
        assert (target / "f").read_text() == content and os.listdir(tmp_path) == ["pack"]
    monkeypatch.setattr("lfq_tokenizer.files._exchange", lambda one, other: False)
    with whole_folder(target) as folder:
        write_text("three", folder / "f")
    assert (target / "f").read_text() == "three" and os.listdir(tmp_path) == ["pack"]


def test_what_a_killed_command_left_is_cleared_by_the_next_and_what_lives_stays(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from lfq_tokenizer.files import whole_folder, whole_file
        with whole_folder(Path(sys.argv[1]) / "out") as folder, whole_file(Path(sys.argv[1]) / "x.png") as file:
            (folder / "f").write_text("half")
            print("there", flush=True)
            time.sleep(60)
    """
    living, dead = child(code, tmp_path), child(code, tmp_path)
    for process in (living, dead):
        assert process.stdout.readline() == "there\n"
    assert len(os.listdir(tmp_path)) == 4
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    with whole_folder(tmp_path / "out"):
        pass
    assert sorted(name.split(".incomplete")[0] for name in os.listdir(tmp_path)) == [".out", ".x.png", ".x.png", "out"]
    assert clear_leftovers(tmp_path) == 1
    living.terminate()
    living.wait()
    assert clear_leftovers(tmp_path) == 2 and os.listdir(tmp_path) == ["out"]


FULL = "No space left on device"


@pytest.mark.parametrize("broken", [OSError(errno.ENOSPC, FULL), RuntimeError(f"I/O error: {FULL}")])
def test_a_full_disk_is_one_message_with_the_file_and_the_sizes(tmp_path, broken):
    with pytest.raises(DiskFull, match=r"model\.bin could not be written: the disk is full, [\d.]+ .?B free; make room") as found:
        with whole_file(tmp_path / "model.bin"):
            raise broken
    assert isinstance(found.value, (OSError, ValueError)) and os.listdir(tmp_path) == []
    with pytest.raises(DiskFull, match=r"needs 1020\.0 TB and the disk has .* free"):
        check_room(tmp_path / "x", 10**15)
    assert [size_text(n) for n in (1, 999, 2_000_000, 33_100_000_000)] == ["1 byte", "999 bytes", "2.0 MB", "33.1 GB"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_folder_that_fails_names_the_file_as_it_would_be_called(tmp_path, number):
    with pytest.raises(OSError) as found, whole_folder(tmp_path / "out") as folder, whole_file(folder / "x.png"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "out" / "x.png") in str(found.value) and ".incomplete" not in str(found.value)
    with pytest.raises(OSError) as found, whole_folder(tmp_path / "out") as folder:
        (folder / "y" / "z").write_text("no folder")
    assert str(found.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'out' / 'y' / 'z'}'"
    with pytest.raises(OSError) as found, whole_folder(tmp_path / "out"):
        raise OSError(number, "of no file")
    assert str(found.value) == f"[Errno {number}] of no file" and os.listdir(tmp_path) == []


def test_one_process_at_a_time_and_a_dead_owner_holds_nothing(tmp_path):
    code = """
        import os, sys, time
        from pathlib import Path
        from lfq_tokenizer.lock import FolderLock
        with FolderLock(Path(sys.argv[1])):
            if os.fork() == 0:          # a loader process that outlives its trainer, and runs by now
                print("held", flush=True)
                time.sleep(20)
                os._exit(0)
            time.sleep(60)
    """
    owner = child(code, tmp_path)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(Locked, match=rf"is in use by process {owner.pid} on "), FolderLock(tmp_path):
        pass
    owner.kill()
    owner.wait()
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()
    with FolderLock(tmp_path, shared=True), FolderLock(tmp_path, shared=True):
        with pytest.raises(Locked), FolderLock(tmp_path):
            pass


def test_nothing_outside_a_folder_is_meant(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "in" / "link").symlink_to("../secret")
    (tmp_path / "in" / "own").symlink_to("file")
    assert inside(tmp_path / "in" / "own", tmp_path / "in").name == "file"
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path / "in" / "link", tmp_path / "in")


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("NaN", "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("1" * 5000, "too many digits"),
        (b"\xff\xfe", "no UTF-8"),
        ("{", "not valid JSON"),
    ],
)
def test_json_of_strangers_is_refused_by_its_source(text, said):
    with pytest.raises(ValueError, match=f"^there: .*{said}"):
        parse_json(text, "there")


def test_json_files_are_bounded_and_regular(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "JSON_BYTES", 100)
    (tmp_path / "big.json").write_text("[" + "1," * 100 + "1]")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"big\.json has 203 bytes; at most 100 bytes are read"):
        read_json(tmp_path / "big.json")
    with pytest.raises(ValueError, match=r"pipe\.json is no regular file"):
        read_json(tmp_path / "pipe.json")


def test_text_of_strangers():
    assert printable("a\x1b[31m\u202eb\x9b\n") == "a\\x1b[31m\\u202eb\\x9b\\x0a" and printable("a\tb\n", lines=True) == "a\tb\n"
    assert text_lines("a\r\nb\rc\nd\u2028e\x0bf\n\ng") == ["a", "b", "c", "d\u2028e\x0bf", "", "g"] and text_lines("") == []
    assert decoded("\ufeffä".encode(), "f") == "ä"
    with pytest.raises(ValueError, match="^f, line 3: not UTF-8 \\(byte 0xe9 at position 5\\)"):
        decoded(b"a\rb\r\n\xe9", "f")
    with pytest.raises(ValueError, match="UTF-16"):
        decoded("a".encode("utf-16"), "f")
    with pytest.raises(ValueError, match=r"a lone surrogate U\+D83D at position 1"):
        check_unicode("a\ud83d", "f")


def test_security_md_states_every_limit_and_the_environment_raises_it():
    """One place in the code, the same figures for people."""
    names = [name for name in vars(limits) if name.isupper() and name != "MB"]
    said = (Path(__file__).parent.parent / "SECURITY.md").read_text(encoding="utf-8")
    assert len(names) > 10
    for name in names:
        assert f"| `{name}` | {getattr(limits, name):,} |" in said, name
    code = "from lfq_tokenizer import limits; print(limits.JOBS)"
    environment = os.environ | {"BITDANCE_LIMIT_JOBS": "7"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "7\n"
