"""Prompts become validated jobs; everything wrong with a prompt file is found before a model is loaded."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from bitdance.jobs.job import Job, JobDefaults, Jobs, Request, batches, job_hash, parse_shard, requests_from_arguments, slug
from bitdance.jobs.prompt_file import PromptFile, safe_name

SETTINGS = JobDefaults(height=64, width=64, steps=2, guidance=1.0)


def read_requests(name: str, data: bytes) -> list[Request]:
    return list(PromptFile(name, io.BytesIO(data)))


def plan(*arguments: Any) -> list[Job]:
    return list(Jobs(*arguments))


def lines(*values: object) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


def test_text_file_one_prompt_per_line_blank_lines_skipped() -> None:
    requests = read_requests("p.txt", "\ufeffa cat\r\n\n  zwei Hunde \n{not json\n".encode())
    assert [r.prompt for r in requests] == ["a cat", "zwei Hunde", "{not json"]
    assert requests[1].source == "p.txt line 3"


def test_standard_input_is_jsonl_when_its_first_line_is_an_object() -> None:
    assert read_requests("-", b'{"prompt": "a"}\n{"prompt": "b", "steps": 3}')[1].steps == 3
    assert read_requests("-", b"a\n{b")[1].prompt == "{b"


def test_jsonl_reads_every_documented_key() -> None:
    value = {"prompt": "x", "id": "k", "seed": 5, "height": 32, "width": 48, "guidance": 2, "steps": 7, "n": 2}
    jobs = plan(read_requests("j.jsonl", lines(value)), SETTINGS)
    assert jobs == [Job(i, f"k-{5 + i}.png", "x", 5 + i, 32, 48, 7, 2.0) for i in range(2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"promt": "x"}', r"j.jsonl line 2: unknown key 'promt'; did you mean 'prompt'\?"),
        (b'{"prompt": "x", "sed": 1}', "line 2: unknown key 'sed'; did you mean 'seed'"),
        (b'{"prompt": "x", "zzz": 1}', "line 2: unknown key 'zzz'; known keys: prompt, id"),
        (b'{"id": "x"}', 'line 2: has no "prompt"'),
        (b'{"prompt": 3}', "line 2: a prompt must be a string"),
        (b'{"prompt": "a\\ud800b"}', "line 2: .*surrogate U.D800 at position 1"),
        (b'{"prompt": "x", "steps": -3}', "line 2: steps = -3; a whole number from 1 to"),
        (b'{"prompt": "x", "steps": 2.5}', "line 2: steps = 2.5"),
        (b'{"prompt": "x", "seed": true}', "line 2: seed = True"),
        (b'{"prompt": "x", "seed": -1}', "line 2: seed = -1"),
        (b'{"prompt": "x", "guidance": NaN}', "line 2: guidance = nan"),
        (b'{"prompt": "x", "guidance": "7"}', "line 2: guidance = '7'"),
        (b'{"prompt": "x", "n": 0}', "line 2: n = 0"),
        (b'{"prompt": "x", "id": "../.."}', "line 2: id '../..' leaves nothing"),
        (b'{"prompt": "x", "id": "..."}', "line 2: id '...' leaves nothing"),
        (b'{"prompt": "x", "id": 7}', "line 2: id is 7"),
        (b'{"prompt": "x", "prompt": "y"}', "line 2: key 'prompt' is given twice"),
        (b'["x"]', "line 2: holds list, not an object"),
        (b'{"prompt": "x"', "line 2: not valid JSON"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", "line 2: "),
        (b"[" * 100_000, "line 2: nested too deeply"),
        (b'{"prompt": "\xff"}', "line 2: not UTF-8 at byte 31 of the file"),
    ],
)
def test_a_broken_line_is_named(line: bytes, message: str) -> None:
    data = b'{"prompt": "good"}\n' + line
    with pytest.raises(ValueError, match=message) as error:
        plan(read_requests("j.jsonl", data), SETTINGS)
    assert str(error.value).count("j.jsonl line 2") == 1


def test_a_file_without_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no prompt"):
        read_requests("p.txt", b"\n \n")


def test_an_unsupported_size_names_the_line() -> None:
    def check(height: int, width: int) -> None:
        if width != 64:
            raise ValueError(f"no {width}")

    with pytest.raises(ValueError, match="j.jsonl line 1: no 65"):
        plan(read_requests("j.jsonl", lines({"prompt": "x", "width": 65})), SETTINGS, check)


def test_each_prompt_takes_each_seed_and_counts_up() -> None:
    jobs = plan(requests_from_arguments(["a", "b"]), JobDefaults(64, 64, 2, 1.0, seeds=(3, 9), n=2))
    assert [(job.prompt, job.seed) for job in jobs] == [(p, s) for p in "ab" for s in (3, 4, 9, 10)]
    assert [job.index for job in jobs] == list(range(8))
    assert [job.seed for job in plan(requests_from_arguments(["a", "b"]), SETTINGS)] == [0, 0]


def test_overlapping_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="seed 2 is asked for twice"):
        plan(requests_from_arguments(["a"]), JobDefaults(64, 64, 2, 1.0, seeds=(1, 2), n=2))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("../../etc/passwd", "etc-passwd"),
        (".hidden", "hidden"),
        ("a b\tc\0d", "a-b-c-d"),
        ("C:\\x|y?", "C-x-y-"),
        ("ä" * 100, "ä" * 60),
    ],
)
def test_ids_become_harmless_file_names(name: str, stem: str) -> None:
    assert safe_name(name, "here") == stem
    assert len(stem.encode()) <= 120


@pytest.mark.parametrize("ids", [("a/b", "a:b"), ("Same", "same"), ("x" * 130, "x" * 140)])
def test_colliding_file_names_are_refused(ids: tuple[str, str]) -> None:
    data = lines(*({"prompt": "p", "id": name} for name in ids))
    with pytest.raises(ValueError, match=r"line 2: its file .* is already taken by j.jsonl line 1"):
        plan(read_requests("j.jsonl", data), SETTINGS)


def test_names_of_prompts_are_readable_and_short() -> None:
    assert plan(requests_from_arguments(["A red  Apple!"]), SETTINGS)[0].file == "0000-a-red-apple-0.png"
    assert plan(requests_from_arguments([""]), SETTINGS)[0].file == "0000-empty-0.png"
    assert slug("…/..") == "picture"
    assert slug("кот " * 1000).startswith("кот-кот") and len(slug("кот " * 1000).encode()) <= 48


@pytest.mark.parametrize("text", ["3/3", "-1/2", "1", "a/b", "0/0", "1/2/3"])
def test_impossible_shards_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="0 ≤ I < N"):
        parse_shard(text)


def test_shards_part_the_jobs() -> None:
    assert parse_shard("1/3") == (1, 3)


def test_batches_share_settings_and_keep_everything() -> None:
    requests = [Request("p", f"line {i}", steps=2 + i % 2) for i in range(7)]
    groups = batches(plan(requests, SETTINGS), 3)
    assert [len(group) for group in groups] == [2, 2, 3]
    assert all(len({job.settings for job in group}) == 1 for group in groups)
    assert sorted(job.index for group in groups for job in group) == list(range(7))


def test_batches_are_as_few_and_as_even_as_the_size_allows() -> None:
    jobs = plan(requests_from_arguments(["p"]), JobDefaults(64, 64, 2, 1.0, n=100))
    for count in range(1, 101):
        sizes = [len(batch) for batch in batches(jobs[:count], 8)]
        assert len(sizes) == -(-count // 8) and sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_batches_hold_neighbours_in_length_whatever_the_order_of_the_prompts() -> None:
    jobs = plan(requests_from_arguments(["x" * (i * 7 % 20) for i in range(20)]), SETTINGS)
    lengths = [[len(job.prompt) for job in batch] for batch in batches(jobs, 8, lambda job: len(job.prompt))]
    assert lengths == [list(range(7)), list(range(7, 14)), list(range(14, 20))]
    same = plan(requests_from_arguments(["a", "b", "c"]), SETTINGS)
    assert batches(same, 8, lambda job: len(job.prompt)) == [same]  # equal lengths stay as given


def test_the_job_hash_follows_what_decides_the_picture_and_nothing_else() -> None:
    job = Job(0, "a.png", "p", 1, 64, 64, 2, 1.0)
    base = job_hash(job, "m", "float32")
    assert job_hash(Job(9, "b.png", "p", 1, 64, 64, 2, 1.0), "m", "float32") == base
    others = [
        Job(0, "a.png", "q", 1, 64, 64, 2, 1.0),
        Job(0, "a.png", "p", 2, 64, 64, 2, 1.0),
        Job(0, "a.png", "p", 1, 32, 64, 2, 1.0),
        Job(0, "a.png", "p", 1, 64, 32, 2, 1.0),
        Job(0, "a.png", "p", 1, 64, 64, 3, 1.0),
        Job(0, "a.png", "p", 1, 64, 64, 2, 1.5),
    ]
    hashes = {job_hash(other, "m", "float32") for other in others} | {
        job_hash(job, "n", "float32"),
        job_hash(job, "m", "x"),
    }
    assert len(hashes) == 8 and base not in hashes


def test_the_prompts_of_the_demo_are_sixteen_jobs() -> None:
    path = Path(__file__).parent.parent / "configs" / "demo" / "prompts.txt"
    assert len(plan(read_requests(path.name, path.read_bytes()), SETTINGS)) == 16
