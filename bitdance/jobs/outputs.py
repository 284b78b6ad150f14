"""The output folder of `bitdance generate`: PNGs, manifest, failures. A stop anywhere loses at most one picture."""

import errno
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from bitdance.jobs.job import Job
from bitdance.picture import grid, read_metadata, write_png
from lfq_tokenizer.files import clear_leftovers, fsync, write_text
from lfq_tokenizer.lock import FolderLock

MANIFEST = "manifest.jsonl"
HASH_KEY = "job_hash"
GRID_LIMIT = 256  # pictures on one sheet
Failures = Sequence[tuple[Job, str]]  # with the reason
_END_OF_PNG = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class OutputFolder:
    """Writes pictures one by one; knows which a run before has finished. `model` is the name in the manifest."""

    def __init__(self, folder: Path | str, model: str, shard: tuple[int, int] = (0, 1)) -> None:
        self.folder = Path(folder)
        self.model = model
        part = "" if shard[1] == 1 else f"-{shard[0]}-of-{shard[1]}"
        self.failures = self.folder / f"failures{part}.jsonl"
        self.grid = self.folder / f"grid{part}.png"
        self._lock = f".lock{part}"
        self._listed: set[str] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder is this command's for as long as the block takes; `Locked`, a ValueError, names who holds it.

        Shards of one command work beside each other: each holds its own part and all of them keep out a command for the
        whole. What killed commands left half-written is cleared.
        """
        fresh = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            if fresh:
                locks.callback(_remove_if_empty, self.folder)
            if self._lock != ".lock":
                locks.enter_context(FolderLock(self.folder, ".lock", shared=True))
            locks.enter_context(FolderLock(self.folder, self._lock))
            clear_leftovers(self.folder)
            self._listed = self._read_manifest()
            yield

    def check_writable(self) -> None:
        """ValueError when the folder could not be written, found before a model is loaded; nothing is created."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise ValueError(f"-o {self.folder}: {existing} is a file; choose another folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"-o {self.folder}: {existing} cannot be written; choose another folder")

    def missing(self, jobs: Iterable[Job], hash_of: Callable[[Job], str]) -> list[Job]:
        """The jobs that are not done. Those that are get their line in the manifest, if a stop had left it out."""
        todo = []
        for job in jobs:
            if not self.is_done(job, hash_of(job)):
                todo.append(job)
            elif job.file not in self._listed:
                self._append(job, None)  # its seconds are unknown
        return todo

    def is_done(self, job: Job, job_hash: str) -> bool:
        """Whether the job's PNG exists, is whole, and was made by the same job."""
        path = self.folder / job.file
        try:
            with path.open("rb") as file:
                file.seek(-len(_END_OF_PNG), os.SEEK_END)
                whole = file.read() == _END_OF_PNG  # metadata comes first in the file: it alone does not prove the rest
            return whole and read_metadata(path).get(HASH_KEY) == job_hash
        except (OSError, ValueError):
            return False

    def save(self, job: Job, picture: Image.Image, metadata: Mapping[str, Any], seconds: float) -> None:
        """The PNG first, whole and on disk, then its line of the manifest."""
        path = self.folder / job.file
        write_png(picture, path, metadata)
        fsync(self.folder)
        self._append(job, round(seconds, 3))

    def write_failures(self, failures: Failures) -> None:
        """failures.jsonl holds what failed in the last run; it is removed when nothing did."""
        if not failures:
            self.failures.unlink(missing_ok=True)
            return
        size = ("seed", "height", "width")
        rows = [
            {"file": job.file, **job.words, **{name: job.metadata[name] for name in size}, "error": error}
            for job, error in failures
        ]
        write_text("".join(json.dumps(row) + "\n" for row in rows), self.failures)

    def write_grid(self, jobs: Iterable[Job], failed: Collection[Job] = ()) -> bool:
        """All pictures that exist on one sheet, also those of runs before; False when there is none. Warns where it holds only
        the first of them."""
        missing = {job.index for job in failed}
        present = list(islice((job for job in jobs if job.index not in missing), GRID_LIMIT + 1))
        if len(present) > GRID_LIMIT:
            warnings.warn(f"the grid shows the first {GRID_LIMIT} pictures", stacklevel=2)
        if present:
            write_png(grid([_opened(self.folder / job.file) for job in present[:GRID_LIMIT]]), self.grid)
        return bool(present)

    def _append(self, job: Job, seconds: float | None) -> None:
        row = {"file": job.file, **job.metadata, "model": self.model, "seconds": seconds}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
        # One write in append mode: shards may share the file. A torn last line of a killed run is closed first.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.folder / MANIFEST, flags, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):  # as a disk takes it that is full within the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / MANIFEST))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._listed.add(job.file)

    def _read_manifest(self) -> set[str]:
        path = self.folder / MANIFEST
        files: set[str] = set()
        if not path.is_file():
            return files
        with path.open("rb") as lines:
            for line in lines:
                try:
                    files.add(json.loads(line)["file"])
                except (ValueError, KeyError, TypeError, RecursionError):  # blank or torn line
                    continue
        return files


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _opened(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as picture:
        return picture.convert("RGB")
