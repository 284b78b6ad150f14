"""The output folder of `bitdance generate`: PNGs, manifest, failures. A stop anywhere loses at most one picture."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bitdance.jobs import Job
from bitdance.picture import read_metadata, write_png
from lfq_tokenizer.files import fsync

MANIFEST = "manifest.jsonl"
HASH_KEY = "job_hash"
_END_OF_PNG = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class OutputFolder:
    """Writes pictures one by one; knows which a run before has finished. `model` is the name in the manifest."""

    def __init__(self, folder: Path | str, model: str, shard: tuple[int, int] = (0, 1)) -> None:
        self.folder = Path(folder)
        self.model = model
        part = "" if shard[1] == 1 else f"-{shard[0]}-of-{shard[1]}"
        self.failures = self.folder / f"failures{part}.jsonl"
        self.grid = self.folder / f"grid{part}.png"
        self._listed = self._read_manifest()

    def check_writable(self) -> None:
        """ValueError when the folder could not be written, found before a model is loaded; nothing is created."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise ValueError(f"-o {self.folder}: {existing} is a file; choose another folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"-o {self.folder}: {existing} cannot be written; choose another folder")

    def missing(self, jobs: Sequence[Job], hashes: Mapping[int, str]) -> list[Job]:
        """The jobs that are not done. Those that are get their line in the manifest, if a stop had left it out."""
        todo = [job for job in jobs if not self.is_done(job, hashes[job.index])]
        unfinished = {job.index for job in todo}
        for job in jobs:
            if job.index not in unfinished and job.file not in self._listed:
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
        """The PNG first (`.tmp`, then renamed, then synced), then its line of the manifest."""
        path = self.folder / job.file
        write_png(picture, path, metadata)
        fsync(path)
        fsync(self.folder)
        self._append(job, round(seconds, 3))

    def write_failures(self, failures: Sequence[tuple[Job, str]]) -> None:
        """failures.jsonl holds what failed in the last run; it is removed when nothing did."""
        if not failures:
            self.failures.unlink(missing_ok=True)
            return
        rows = [
            {
                "file": job.file,
                "prompt": job.prompt,
                "seed": job.seed,
                "height": job.height,
                "width": job.width,
                "error": error,
            }
            for job, error in failures
        ]
        temporary = self.failures.with_name(self.failures.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self.failures)

    def _append(self, job: Job, seconds: float | None) -> None:
        row = {
            "file": job.file,
            "prompt": job.prompt,
            "seed": job.seed,
            "height": job.height,
            "width": job.width,
            "steps": job.steps,
            "guidance": job.guidance,
            "model": self.model,
            "seconds": seconds,
        }
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
        # One write in append mode: shards may share the file. A torn last line of a killed run is closed first.
        descriptor = os.open(self.folder / MANIFEST, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._listed.add(job.file)

    def _read_manifest(self) -> set[str]:
        path = self.folder / MANIFEST
        if not path.is_file():
            return set()
        files = set()
        for line in path.read_bytes().split(b"\n"):
            try:
                files.add(json.loads(line)["file"])
            except (ValueError, KeyError, TypeError):  # blank or torn line
                continue
        return files
