"""Prompt files as people and programs write them: each is read as it is meant, or refused with the line and a way out."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdance.jobs.job import JobDefaults
from bitdance.jobs.prompt_file import PromptFile
from lfq_tokenizer import limits

pytestmark = pytest.mark.slow

SETTINGS = JobDefaults(64, 64, 2, 1.0)
ROOT = Path(__file__).parent.parent


def read(path: Path) -> list[str]:
    return [request.prompt for request in PromptFile.open(str(path), None)]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.json", b'[{"prompt": "a"}]', r"\.json files are not read; .*\.jsonl"),
        ("p.csv", b"prompt,seed\na,1\n", r"\.csv files are not read"),
        ("p.tsv", b"prompt\tseed\n", r"\.tsv files are not read"),
        ("p.txt", b'{"prompt": "a"}\n', r"p\.txt line 1 is JSON, not a prompt; name the file with \.jsonl"),
        ("p.txt", b'a fox\n["a", "b"]\n', r"p\.txt line 2 is JSON"),
        ("p.txt", b'"prompt","seed"\n"a",1\n', r"line 1 is the head of a table"),
        ("p.txt", "a fox".encode("utf-16"), r"UTF-16 text; save it as UTF-8"),
        ("p.txt", b"a\nb\n\xff\n", r"line 3: not UTF-8 at byte 4"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}', r"line 1: .*lone surrogate U\+D83D at position 0"),
        ("p.ndjson", b'{"prompt": "a"}\na fox\n', r"p\.ndjson line 2: not valid JSON"),
        ("p.txt", b"x" * 3_000_000, r"line 1 is longer than 1\.0 MB"),
        ("p.jsonl", b'{"prompt": "a"}\n' + b" " * 3_000_000, r"line 2 is longer than 1\.0 MB"),
        ("p.txt", b"x" * 900_000, r"has 900,000 characters; at most 250,000"),
        ("p.txt", b"\xef\xbb\xbf\n \n\t\n", "holds no prompt"),
    ],
)
def test_what_is_no_list_of_prompts_says_what_to_do(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        read(tmp_path / name)
    assert name in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "data", "prompts"),
    [
        ("p.txt", b"\xef\xbb\xbfa fox\r\n\r\n  a cat  \rlast", ["a fox", "a cat", "last"]),
        ("p", "ä, ö, and ü\n\u2028x\n".encode(), ["ä, ö, and ü", "\u2028x".strip()]),
        ("p.TEXT", b"nul \0 inside\n[not json\n{curly}\n", ["nul \0 inside", "[not json", "{curly}"]),
        ("p.ndjson", b'\xef\xbb\xbf{"prompt": "a"}\r{"prompt": "b\\nc"}\n', ["a", "b\nc"]),
        ("p.JSONL", b'{"prompt": ""}\n\n{"prompt": "x"}', ["", "x"]),
    ],
)
def test_what_people_write_is_read_as_meant(tmp_path: Path, name: str, data: bytes, prompts: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == prompts


def piped(folder: Path, write: Callable[[int], None]) -> PromptFile:
    """A named pipe that somebody writes into at this moment."""
    path = folder / "pipe"
    os.mkfifo(path)

    def work() -> None:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            write(descriptor)
        except BrokenPipeError:
            pass
        finally:
            os.close(descriptor)

    threading.Thread(target=work, daemon=True).start()
    return PromptFile.open(str(path), None)


def test_a_pipe_is_read_as_standard_input_is(tmp_path: Path) -> None:
    requests = piped(tmp_path, lambda pipe: os.write(pipe, b'{"prompt": "a", "seed": 3}\n{"prompt": "b"}\n') and None)
    assert [(r.prompt, r.seed) for r in requests] == [("a", 3), ("b", None)] == [(r.prompt, r.seed) for r in requests]


def test_a_pipe_without_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROMPT_FILE_BYTES", 5_000_000)

    def forever(pipe: int) -> None:
        while True:
            os.write(pipe, b"y\n" * 10_000)

    with pytest.raises(ValueError, match=r"pipe is longer than 5\.0 MB; part the prompts"):
        piped(tmp_path, forever)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "nowhere.txt", tmp_path / "a\0b"):
        with pytest.raises(ValueError, match="--prompts"):
            PromptFile.open(str(name), None)
    if os.geteuid():  # root may read everything
        (tmp_path / "p.txt").write_text("a")
        (tmp_path / "p.txt").chmod(0)
        with pytest.raises(ValueError, match=r"p\.txt: Permission denied"):
            PromptFile.open(str(tmp_path / "p.txt"), None)


MANY = """
import sys, time
from bitdance.jobs.job import Jobs, JobDefaults
from bitdance.jobs.prompt_file import PromptFile
def memory(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before, start = memory(), time.process_time()
jobs = Jobs(PromptFile.open(sys.argv[1], None), JobDefaults(64, 64, 2, 1.0))
assert len(jobs) == 200_000 and sum(1 for _ in jobs) == 200_000
print(memory() - before, time.process_time() - start)
"""


def test_two_hundred_thousand_lines_take_little_memory_and_time(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"picture {i}", "id": f"p{i}", "seed": i}) + "\n" for i in range(200_000)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", MANY, str(path)], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    grown, seconds = map(float, found.stdout.split())
    assert grown < 100e6, f"{grown / 1e6:.0f} MB"
    assert seconds < 200_000 * 100e-6, f"{seconds / 200_000 * 1e6:.0f} µs a line"  # about 20 of a quick processor
