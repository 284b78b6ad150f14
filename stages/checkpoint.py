"""Life cycle of a training checkpoint: whole or absent, whatever happens in between.

    RUN/step_00000500.incomplete/   being written
    RUN/step_00000500/              published by one rename, after every file is on disk and listed in manifest.json
    RUN/latest                      name of the newest one, replaced atomically afterwards

The resume state inside (resume_state.py) is private to the run and never a format to share.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from bitdance.checkpoint import resolve
from lfq_tokenizer.files import fsync, replace_folder, sha256
from lfq_tokenizer.json_file import read_json, write_json
from stages import processes

INCOMPLETE = ".incomplete"
ADAPTER = "adapter"  # what a checkpoint of LoRA holds in place of model/


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def save(run: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Publish a checkpoint. `write(folder)` is called on every process, all see one disk; only process 0 renames and prunes.

    ValueError on every process, before anything is written, when the disk has not the room that the last checkpoint took.
    """
    _check_room(run)
    final = step_folder(run, step)
    working = final.with_name(final.name + INCOMPLETE)
    first = processes.rank() == 0
    if first:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
    processes.barrier()
    write(working)
    processes.barrier()
    files = sorted(p for p in working.rglob("*") if p.is_file())
    digests = _digests(files)
    if first:
        manifest = {str(p.relative_to(working)): {"bytes": p.stat().st_size, "sha256": digests[p]} for p in files}
        write_json({"step": step, "files": manifest}, working / "manifest.json")
        for path in [*files, working / "manifest.json"]:
            fsync(path)
        replace_folder(working, final)
        pointer = run / "latest.tmp"
        pointer.write_text(final.name + "\n")
        os.replace(pointer, run / "latest")
        # Later steps are of a run that was abandoned (--resume no, or from an older step); they are nobody's to delete here.
        for old in [p for p in complete(run) if p <= final][:-keep]:
            shutil.rmtree(old)
    processes.barrier()
    return final


def complete(run: Path) -> list[Path]:
    """Published checkpoints of a run, oldest first."""
    return sorted(p for p in run.glob("step_*") if p.is_dir() and not p.name.endswith(INCOMPLETE))


def last_saved(run: Path) -> Path | None:
    """The checkpoint that `latest` names, else that of the highest step."""
    pointer = run / "latest"
    if pointer.is_file():
        path = run / Path(pointer.read_text().strip()).name
        if path in complete(run):
            return path
    found = complete(run)
    return found[-1] if found else None


def find(resume: str, run: Path) -> Path | None:
    """What `--resume auto|no|PATH` means. FileNotFoundError or ValueError when PATH is not a whole checkpoint."""
    if resume == "no":
        return None
    if resume == "auto":
        return last_saved(run)
    path = Path(resume)
    if not path.is_dir():
        raise FileNotFoundError(f"--resume {path}: no such checkpoint folder; use 'auto', 'no' or a folder step_NNNNNNNN")
    return path


def newest(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the checkpoint that the run `path` saved last."""
    if (path / "manifest.json").is_file():
        return path
    found = last_saved(path)
    if found is None:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a run with one (looked for step_*/manifest.json)")
    return found


def model_folder(place: Path | str) -> Path:
    """The model that `place` means: a folder in the published layout, "demo", a checkpoint, or a run (its newest).

    ValueError when that holds an adapter and no model of its own."""
    path = Path(place)
    if (path / "manifest.json").is_file() or (path / "latest").is_file():
        folder = newest(path)
        if (folder / ADAPTER).is_dir():
            raise ValueError(f"{place} holds an adapter, not a model; merge it with its base first: bitdance export {place} OUT")
        return folder / "model"
    return resolve(place)


def verify(folder: Path) -> int:
    """The step of a whole checkpoint. ValueError lists the first ten files that are missing or changed.

    Where there are several processes all must take part, and all get the same answer.
    """
    manifest_path = folder / "manifest.json"
    if folder.name.endswith(INCOMPLETE) or not manifest_path.is_file():
        raise ValueError(f"{folder} is not a finished checkpoint (no manifest.json); resume from an older step")
    manifest = read_json(manifest_path)
    files = {folder / name: entry for name, entry in manifest["files"].items()}
    sizes = {path: path.stat().st_size if path.is_file() else None for path in files}
    digests = _digests([path for path, entry in files.items() if sizes[path] == entry["bytes"]])
    wrong = []
    for path, entry in files.items():
        name = path.relative_to(folder)
        if sizes[path] is None:
            wrong.append(f"{name} is missing")
        elif path not in digests:
            wrong.append(f"{name} has {sizes[path]} bytes, expected {entry['bytes']}")
        elif digests[path] != entry["sha256"]:
            wrong.append(f"{name} has another SHA-256 than the manifest")
    if wrong:
        raise ValueError(f"{folder} is damaged: " + "; ".join(wrong[:10]) + ". Resume from an older step.")
    return int(manifest["step"])


def _check_room(run: Path) -> None:
    """Process 0 looks; all processes get its answer, so that none waits for the others at a barrier."""
    answer = ""
    last = last_saved(run) if processes.rank() == 0 else None
    if last is not None:
        needed = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
        free = shutil.disk_usage(run).free
        if free < needed:
            answer = (
                f"a checkpoint in {run} needs {needed:,} bytes and {free:,} are free; make room and resume from {last.name}, "
                "or keep fewer checkpoints (run.keep)"
            )
    answer = processes.from_first(answer)
    if answer:
        raise ValueError(answer)


def _digests(paths: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of files; the processes share the reading, and all get every answer."""
    mine = {path: sha256(path) for path in paths[processes.rank() :: processes.world()]}
    return {path: digest for part in processes.everyone(mine) for path, digest in part.items()}
