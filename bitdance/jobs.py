"""Prompts → validated jobs. Everything wrong with a prompt file is found here, before a model is loaded.

A request is one prompt as the user gave it (an argument, a line of text, a JSONL object); a job is one picture to make.
Neither torch nor a model is needed to plan.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitdance.prompt import check_prompt

MAX_NAME_BYTES = 120
MAX_SLUG_BYTES = 48
RANGES: dict[str, tuple[int, int]] = {
    "seed": (0, 2**63 - 1),
    "height": (1, 65_536),
    "width": (1, 65_536),
    "steps": (1, 10_000),
    "n": (1, 100_000),
    "batch_size": (1, 4096),
}
KEYS = ("prompt", "id", "seed", "height", "width", "guidance", "steps", "n")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_IN_NAMES = re.compile(r'[\x00-\x20\x7f/\\:*?"<>|]+')


@dataclass(frozen=True)
class Request:
    """One prompt as given. `None` means "not said here"; `source` names the place in errors ("jobs.jsonl line 3")."""

    prompt: str
    source: str
    id: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    steps: int | None = None
    n: int | None = None


@dataclass(frozen=True)
class Settings:
    """What holds for every request that does not say otherwise. Sizes in pixels, `steps` per block."""

    height: int
    width: int
    steps: int
    guidance: float
    seeds: tuple[int, ...] = (0,)
    n: int = 1


@dataclass(frozen=True)
class Job:
    """One picture. `index` is its place among all pictures of the command; `file` its name inside the output folder."""

    index: int
    file: str
    prompt: str
    seed: int
    height: int
    width: int
    steps: int
    guidance: float

    @property
    def settings(self) -> tuple[int, int, int, float]:
        """Jobs with equal settings can share a batch."""
        return self.height, self.width, self.steps, self.guidance


def checked_prompt(prompt: Any, source: str) -> str:
    """The prompt as the model reads it ("" is the unconditional picture); ValueError names source and position."""
    try:
        return check_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def check_number(name: str, value: Any, source: str) -> Any:
    """The value of one of `seed height width steps n guidance`, if it is a number in range."""
    if name == "guidance":
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(
                f"{source}: guidance = {value!r}; a finite number ≥ 0 is allowed, 1 and below switch it off"
            )
        return float(value)
    low, high = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{source}: {name} = {value!r}; a whole number from {low} to {high} is allowed")
    return value


def requests_from_arguments(prompts: Sequence[str]) -> list[Request]:
    """Prompts of the command line, in order."""
    return [Request(checked_prompt(p, f"prompt {i}"), f"prompt {i}") for i, p in enumerate(prompts, 1)]


def read_requests(name: str, data: bytes) -> list[Request]:
    """The prompts of a file.

    `.jsonl`: one JSON object per line; anything else: one prompt per line, blank lines skipped. `name` "-" is standard
    input, read as JSONL when its first line starts with "{". Errors name the line.
    """
    label = "standard input" if name == "-" else name
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{label} line {line}: not UTF-8 at byte {error.start} of the file; save it as UTF-8"
        ) from None
    lines = [(f"{label} line {i}", line.strip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    is_jsonl = Path(name).suffix.lower() == ".jsonl" or (
        name == "-" and bool(lines) and lines[0][1].lstrip().startswith("{")
    )
    if not lines:
        raise ValueError(f"{label} holds no prompt; write one per line")
    if is_jsonl:
        return [_from_json(line, source) for source, line in lines]
    return [Request(checked_prompt(line.strip(), source), source) for source, line in lines]


def _from_json(line: str, source: str) -> Request:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{source}: key {twice[0]!r} is given twice; keep one")
        return dict(pairs)

    try:
        value = json.loads(line, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply; one flat object per line is allowed") from None
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f'{source}: holds {type(value).__name__}, not an object; write {{"prompt": "…"}}')
    for key in value:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{source}: unknown key {key!r}; {hint}known keys: {', '.join(KEYS)}")
    if "prompt" not in value:
        raise ValueError(f'{source}: has no "prompt"; only this key is required')
    fields = {name: check_number(name, value[name], source) for name in (*RANGES, "guidance") if name in value}
    if "id" in value:
        fields["id"] = safe_name(value["id"], source)
    return Request(prompt=checked_prompt(value["prompt"], source), source=source, **fields)


def safe_name(name: Any, source: str) -> str:
    """An id as a file name stem: no separators, spaces or control characters, no leading dot, at most 120 bytes."""
    if not isinstance(name, str):
        raise ValueError(f"{source}: id is {json.dumps(name)}; it must be a string")
    if found := _SURROGATE.search(name):
        raise ValueError(
            f"{source}: id has a lone surrogate U+{ord(found.group()):04X} at position {found.start()}; remove it"
        )
    stem = _cut(_NOT_IN_NAMES.sub("-", unicodedata.normalize("NFC", name)).lstrip(".-").rstrip("."), MAX_NAME_BYTES)
    if not stem:
        raise ValueError(f"{source}: id {name!r} leaves nothing for a file name; use letters or digits")
    return stem


def slug(prompt: str) -> str:
    """A short readable part of a file name: "A red apple!" → "a-red-apple"."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt[:400]).casefold()).strip("-")
    return _cut(words, MAX_SLUG_BYTES).strip("-") or ("picture" if prompt else "empty")


def _cut(text: str, limit: int) -> str:
    return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")


def plan(
    requests: Iterable[Request], settings: Settings, check_size: Callable[[int, int], object] | None = None
) -> list[Job]:
    """Requests → jobs, in order: each prompt × each seed × each of its `n` pictures; picture k has seed + k.

    What a request says wins over `settings`. `check_size(height, width)` raises ValueError for a size the model lacks.
    Two pictures that would share a file are refused here.
    """
    jobs: list[Job] = []
    taken: dict[str, str] = {}
    for number, request in enumerate(requests):
        height = settings.height if request.height is None else request.height
        width = settings.width if request.width is None else request.width
        if check_size is not None:
            try:
                check_size(height, width)
            except ValueError as error:
                raise ValueError(f"{request.source}: {error}") from None
        seeds = settings.seeds if request.seed is None else (request.seed,)
        n = settings.n if request.n is None else request.n
        stem = request.id if request.id is not None else f"{number:04d}-{slug(request.prompt)}"
        wanted = [seed + k for seed in seeds for k in range(n)]
        if twice := [seed for seed, count in Counter(wanted).items() if count > 1]:
            raise ValueError(
                f"{request.source}: seed {twice[0]} is asked for twice (seeds {list(seeds)}, each counting up over {n} "
                "pictures); give seeds that lie further apart"
            )
        for seed in wanted:
            check_number("seed", seed, request.source)
            file = f"{stem}-{seed}.png"
            if (other := taken.setdefault(file.casefold(), request.source)) != request.source:
                raise ValueError(f"{request.source}: its file {file} is already taken by {other}; give each its own id")
            jobs.append(
                Job(
                    index=len(jobs),
                    file=file,
                    prompt=request.prompt,
                    seed=seed,
                    height=height,
                    width=width,
                    steps=settings.steps if request.steps is None else request.steps,
                    guidance=settings.guidance if request.guidance is None else request.guidance,
                )
            )
    return jobs


def parse_shard(text: str) -> tuple[int, int]:
    """ "I/N" → (I, N) with 0 ≤ I < N."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"shard {text!r}; I/N with 0 ≤ I < N is allowed, for example 0/8")
    return int(found[1]), int(found[2])


def batches(jobs: Iterable[Job], size: int, length: Callable[[Job], int] = lambda job: 0) -> list[list[Job]]:
    """As few groups as `size` allows, in each of them jobs with equal settings and similar `length` (of the prompt).

    Settings come in order of first appearance, inside them jobs from short to long, equal lengths as given. Prompts are
    padded to the longest of their batch: neighbours in length waste little. The jobs of a setting are shared out
    evenly (9 jobs at size 8: 5 and 4), so that no batch runs nearly empty; inside a batch they stand as given.
    """
    groups: dict[tuple[int, int, int, float], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.settings, []).append(job)
    shared = [batch for group in groups.values() for batch in _shared_out(sorted(group, key=length), size)]
    return [sorted(batch, key=lambda job: job.index) for batch in shared]


def _shared_out(jobs: list[Job], size: int) -> list[list[Job]]:
    count = math.ceil(len(jobs) / size)
    bounds = [math.ceil(len(jobs) * i / count) for i in range(count + 1)]
    return [jobs[start:end] for start, end in pairwise(bounds)]


def job_hash(job: Job, model: str, dtype: str, more: Mapping[str, Any] | None = None) -> str:
    """What makes a finished picture the one asked for: the job without its place, the weights, the dtype, and what `more`
    says that the published procedure does not."""
    content = {k: v for k, v in dataclasses.asdict(job).items() if k not in ("index", "file")}
    content |= {"model": model, "dtype": dtype}
    content |= {k: v for k, v in (more or {}).items() if (k, v) != ("sampler", "euler_maruyama")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()[:32]
