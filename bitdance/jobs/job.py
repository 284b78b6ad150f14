"""Requests → jobs, one picture each. Everything wrong with them is found here, before a model is loaded.

A request is one prompt as the user gave it (an argument, a line of text, a JSONL object); a job is one picture to make.
Neither torch nor a model is needed to plan, and no list of jobs is held: a million lines are checked in one pass and read again.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

from bitdance.sequence.prompt import check_prompt
from bitdance.values import check_number, shown
from lfq_tokenizer import limits

MAX_SLUG_BYTES = 48
_NUMBERED = re.compile(r"([0-9]{4,12})-")


class Request(NamedTuple):
    """One prompt, or the label of a class, as given. `None` means "not said here"; `source` names the place in errors
    ("jobs.jsonl line 3"). `name` is what a class is called, once that is known."""

    prompt: str
    source: str
    id: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    steps: int | None = None
    n: int | None = None
    label: int | str | None = None
    name: str = ""


def checked_prompt(prompt: Any, source: str) -> str:
    """The prompt as the model reads it ("" is the unconditional picture); ValueError names source and position."""
    try:
        return check_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def requests_from_arguments(prompts: Sequence[str]) -> list[Request]:
    """Prompts of the command line, in order."""
    return [Request(checked_prompt(p, f"prompt {i}"), f"prompt {i}") for i, p in enumerate(prompts, 1)]


@dataclass(frozen=True)
class JobDefaults:
    """What holds for every request that does not say otherwise. Sizes in pixels, `steps` per block."""

    height: int
    width: int
    steps: int
    guidance: float
    seeds: tuple[int, ...] = (0,)
    n: int = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One picture. `index` is its place among all pictures of the command; `file` its name inside the output folder.
    `label` is the number of its class, None where it is of a prompt, and `name` what the class is called."""

    index: int
    file: str
    prompt: str
    seed: int
    height: int
    width: int
    steps: int
    guidance: float
    label: int | None = None
    name: str = ""

    @property
    def condition(self) -> str | int:
        """What a pipeline is called with: the prompt, or the number of a class."""
        return self.prompt if self.label is None else self.label

    @property
    def words(self) -> dict[str, Any]:
        """What manifest and picture say of the condition."""
        return {"prompt": self.prompt} if self.label is None else {"class": self.label, "class_name": self.name}

    @property
    def metadata(self) -> dict[str, Any]:
        """What manifest and picture say of the job."""
        numbers = ("seed", "height", "width", "steps", "guidance")
        return {**self.words, **{name: getattr(self, name) for name in numbers}}

    @property
    def settings(self) -> tuple[int, int, int, float]:
        """Jobs with equal settings can share a batch."""
        return self.height, self.width, self.steps, self.guidance


class Jobs:
    """The jobs of a command, in order: each prompt × each seed × each of its `n` pictures; picture k has seed + k. Of a
    shard (I, N) those with index I, I + N, I + 2N, …

    What a request says wins over `defaults`. `requests` can be iterated more than once, and so can the jobs, which are
    made anew each time. `resolve` says what the model's kind makes of a request: itself, one that knows its class, several. The
    constructor checks all of it: ValueError names the request for a size that `check_size(height, width)` refuses, for two
    pictures that would share a file, and for more pictures than the limit. `sizes` are all (height, width, whether guided) that
    occur, `guidances` all scales.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        defaults: JobDefaults,
        check_size: Callable[[int, int], object] = lambda height, width: None,
        shard: tuple[int, int] = (0, 1),
        resolve: Callable[[Request], Iterable[Request]] = lambda request: (request,),
    ) -> None:
        self._requests, self._resolve, self._defaults, self._shard = requests, resolve, defaults, shard
        self.sizes: set[tuple[int, int, bool]] = set()
        self.guidances: set[float] = set()
        taken: dict[int, Any] = {}
        numbered: dict[int, list[Request]] = {}
        seen: set[tuple[int, int]] = set()
        total = 0
        for request in self._resolved():
            size = self._size(request)
            if size not in seen:
                try:
                    check_size(*size)
                except ValueError as error:
                    raise ValueError(f"{request.source}: {error}") from None
                seen.add(size)
            self.sizes.add((*size, self._guidance(request) > 1))
            self.guidances.add(self._guidance(request))
            total += self._check_seeds(request)
            if request.id is not None:
                self._check_id(request, taken)
                if found := _NUMBERED.match(request.id):
                    numbered.setdefault(int(found[1]), []).append(request)
            if total > limits.JOBS:
                raise ValueError(
                    f"{request.source}: more than {limits.JOBS:,} pictures in one command; part the prompts, or raise "
                    "BITDANCE_LIMIT_JOBS"
                )
        self.total = total
        if numbered:
            self._check_numbered(numbered)

    def __len__(self) -> int:
        part, parts = self._shard
        return len(range(part, self.total, parts))

    def __contains__(self, job: object) -> bool:
        return any(job == mine for mine in self)

    def __iter__(self) -> Iterator[Job]:
        part, parts = self._shard
        start = 0
        for number, request in enumerate(self._resolved()):
            seeds, n = self._seeds(request)
            end = start + len(seeds) * n
            if mine := range(start + (part - start) % parts, end, parts):
                (height, width), stem = self._size(request), _stem(request, number)
                steps = self._defaults.steps if request.steps is None else request.steps
                for index in mine:
                    group, k = divmod(index - start, n)
                    seed = seeds[group] + k
                    file = f"{stem}-{seed}.png"
                    label = request.label if isinstance(request.label, int) else None
                    yield Job(
                        index, file, request.prompt, seed, height, width, steps, self._guidance(request), label, request.name
                    )
            start = end

    def _resolved(self) -> Iterator[Request]:
        return chain.from_iterable(map(self._resolve, self._requests))

    def _size(self, request: Request) -> tuple[int, int]:
        height = self._defaults.height if request.height is None else request.height
        return height, self._defaults.width if request.width is None else request.width

    def _guidance(self, request: Request) -> float:
        return self._defaults.guidance if request.guidance is None else request.guidance

    def _seeds(self, request: Request) -> tuple[tuple[int, ...], int]:
        """First seeds, and how many pictures count up from each."""
        seeds = self._defaults.seeds if request.seed is None else (request.seed,)
        return seeds, self._defaults.n if request.n is None else request.n

    def _check_seeds(self, request: Request) -> int:
        """How many pictures a request asks for. Its seeds are ranges [s, s + n), which are compared without being counted out."""
        seeds, n = self._seeds(request)
        check_number("seed", max(seeds) + n - 1, request.source)
        for one, other in pairwise(sorted(seeds)) if len(seeds) > 1 else ():
            if other < one + n:
                raise ValueError(
                    f"{request.source}: seed {other} is asked for twice (seeds {list(seeds)}, each counting up over {n} "
                    "pictures); give seeds that lie further apart"
                )
        return len(seeds) * n

    def _check_id(self, request: Request, taken: dict[int, Any]) -> None:
        """Files are STEM-SEED.png, so two requests share one when their stems are equal, but for case, and their seeds meet.

        `taken`: hash of a stem → (first seed, n) of all that have it; one picture alone is kept as its seed, which is small.
        """
        stem = str(request.id)
        key, (seeds, n) = hash(stem.casefold()), self._seeds(request)
        before = taken.get(key, ())
        ranges = ((before, 1),) if isinstance(before, int) else before
        for first, count in ranges:
            for seed in seeds:
                if seed < first + count and first < seed + n:
                    raise self._collision(request.source, stem, max(seed, first))
        mine = tuple((seed, n) for seed in seeds)
        taken[key] = seeds[0] if len(seeds) == n == 1 and not ranges else (*ranges, *mine)

    def _check_numbered(self, numbered: dict[int, list[Request]]) -> None:
        """An id may look like the stem that a request without an id gets. `numbered`: such ids by the number that they
        begin with."""
        for number, request in enumerate(self._resolved()):
            for other in numbered.get(number, ()) if request.id is None else ():
                (mine, n), (theirs, m) = self._seeds(request), self._seeds(other)
                for seed, first in ((a, b) for a in mine for b in theirs if a < b + m and b < a + n):
                    if str(other.id).casefold() == _stem(request, number).casefold():
                        raise self._collision(other.source, str(other.id), max(seed, first))

    def _collision(self, source: str, stem: str, seed: int) -> ValueError:
        wanted, others = stem.casefold(), ((r, i) for i, r in enumerate(self._resolved()) if r.source != source)
        other = next((r.source for r, i in others if _stem(r, i).casefold() == wanted), "another line")
        return ValueError(f"{source}: its file {stem}-{seed}.png is already taken by {other}; give each its own id")


def _stem(request: Request, number: int) -> str:
    return f"{number:04d}-{slug(request.name or request.prompt)}" if request.id is None else request.id


def slug(prompt: str) -> str:
    """A short readable part of a file name: "A red apple!" → "a-red-apple"."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt[:400]).casefold()).strip("-")
    return cut(words, MAX_SLUG_BYTES).strip("-") or ("picture" if prompt else "empty")


def cut(text: str, limit: int) -> str:
    """The first `limit` bytes of a text, and no half character."""
    return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")


def parse_shard(text: str) -> tuple[int, int]:
    """ "I/N" → (I, N) with 0 ≤ I < N."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"shard {shown(text)}; I/N with 0 ≤ I < N is allowed, for example 0/8")
    return int(found[1]), int(found[2])


def batches(jobs: Iterable[Job], size: int, length: Callable[[Job], int] = lambda job: 0) -> list[list[Job]]:
    """The jobs in as few groups as `size` allows, in each of them jobs with equal settings and similar `length` (of the prompt).

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
    content = {name: getattr(job, name) for name in ("prompt", "seed", "height", "width", "steps", "guidance")}
    content |= {"model": model, "dtype": dtype}
    if job.label is not None:
        content["class"] = job.label
    content |= {k: v for k, v in (more or {}).items() if (k, v) != ("sampler", "euler_maruyama")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()[:32]
