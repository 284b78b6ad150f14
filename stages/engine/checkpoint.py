"""Life cycle of a training checkpoint: whole or absent, whatever happens in between.

    RUN/.step_00000500.incomplete-…/   being written, under a name that nobody can foresee
    RUN/step_00000500/                 published by one rename, after every file is on disk and listed in manifest.json
    RUN/latest                         name of the newest one, replaced atomically afterwards

The resume state inside (resume_state.py) is private to the run and never a format to share.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitdance.folder.config import resolve
from bitdance.values import Range
from lfq_tokenizer.files import check_room, fsync, inside, replace_folder, sha256, temporary_beside, umask, write_text
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.text import printable
from stages.engine import processes
from stages.engine.run_folder import naming_full

INCOMPLETE = ".incomplete"  # in the name of a folder that is being written
ADAPTER = "adapter"  # what a checkpoint of LoRA holds in place of model/
_NAME = re.compile(r"step_[0-9]{8,15}")
_COUNT = Range(0, 2**60)


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def save(run: Path, step: int, write: Callable[[Path], None], keep: int, least: int = 0) -> Path:
    """Publish a checkpoint. `write(folder)` is called on every process, all see one disk; only process 0 renames and prunes.

    ValueError on every process when the disk has no room: before anything is written where that is less than the last checkpoint
    took, or than `least` bytes, which it will take at least. Whatever fails, nothing is left behind and the last checkpoint
    stays. Where `write` needs all processes at once, what one of them does alone stands in `processes.together`.
    """
    final, first = step_folder(run, step), processes.rank() == 0
    working = temporary_beside(final)
    with processes.together(), naming_full(final):
        if first:
            last = last_saved(run)
            taken = sum(path.stat().st_size for path in last.rglob("*") if path.is_file()) if last else 0
            run.mkdir(parents=True, exist_ok=True)
            check_room(final, max(taken, least))
            working.mkdir()
    working = Path(processes.from_first(str(working)))
    try:
        with processes.together(), naming_full(final):
            write(working)
        with processes.together(), naming_full(final):
            if first:
                _set_modes(working)
        files = sorted(p for p in working.rglob("*") if p.is_file())
        digests = _digests(files)
        with processes.together(), naming_full(final):
            if first:
                _publish(working, final, step, {path: digests[path] for path in files}, keep)
    except BaseException:
        if first:
            shutil.rmtree(working, ignore_errors=True)
        raise
    return final


def _publish(working: Path, final: Path, step: int, digests: dict[Path, str], keep: int) -> None:
    files = {str(p.relative_to(working)): {"bytes": p.stat().st_size, "sha256": digest} for p, digest in digests.items()}
    write_json({"step": step, "files": files}, working / "manifest.json")
    for path in [*digests, working / "manifest.json"]:
        fsync(path)
    replace_folder(working, final)
    run = final.parent
    fsync(run)
    write_text(final.name + "\n", run / "latest")
    # Later steps are of a run that was abandoned (--resume no, or from an older step); they are nobody's to delete here.
    for old in [p for p in complete(run) if p <= final][:-keep]:
        gone = temporary_beside(old)
        os.replace(old, gone)  # at no moment is there half a checkpoint under this name
        shutil.rmtree(gone)


def _set_modes(folder: Path) -> None:
    """Permissions by the umask; some libraries write for their owner alone."""
    mask = umask()
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def complete(run: Path) -> list[Path]:
    """Published checkpoints of a run, oldest first."""
    return sorted(p for p in run.glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir())


def last_saved(run: Path) -> Path | None:
    """The checkpoint that `latest` names, else that of the highest step."""
    pointer = run / "latest"
    if pointer.is_file():
        path = run / Path(pointer.read_text(encoding="utf-8", errors="replace").strip().replace("\0", "")).name
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
    """The step of a whole checkpoint. ValueError lists the first ten files that are missing or changed, or says what is wrong
    with the list itself.

    Where there are several processes all must take part, and all get the same answer.
    """
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file() or INCOMPLETE in folder.name:
        raise ValueError(f"{folder} is not a finished checkpoint (no manifest.json); resume from an older step")
    step, files = read_manifest(manifest_path)
    sizes = {path: path.stat().st_size if path.is_file() else None for path in files}
    digests = _digests([path for path, (size, _) in files.items() if sizes[path] == size])
    wrong = []
    for path, (size, digest) in files.items():
        name = printable(path.relative_to(folder))
        if sizes[path] is None:
            wrong.append(f"{name} is missing")
        elif path not in digests:
            wrong.append(f"{name} has {sizes[path]} bytes, expected {size}")
        elif digests[path] != digest:
            wrong.append(f"{name} has another SHA-256 than the manifest")
    if wrong:
        raise ValueError(f"{folder} is damaged: " + "; ".join(wrong[:10]) + ". Resume from an older step.")
    return step


def read_manifest(path: Path) -> tuple[int, dict[Path, tuple[int, str]]]:
    """The step, and size and SHA-256 of every file. ValueError, naming the manifest, for JSON of another shape and for files
    outside of the checkpoint."""
    found: Any = read_json(path)
    listed = found.get("files") if isinstance(found, dict) else None
    if not isinstance(listed, dict):
        raise ValueError(f"{path} is no manifest of a checkpoint (it lacks step and files); resume from an older step")
    files: dict[Path, tuple[int, str]] = {}
    for name, entry in listed.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(digest, str):
            raise ValueError(f"{path}: the entry of {printable(name)[:100]!r} lacks bytes and sha256; resume from an older step")
        source = f"{path}, {printable(name)[:100]}"
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{source} lies outside of the checkpoint; resume from an older step")
        inside(path.parent / name, path.parent)
        files[path.parent / name] = _COUNT.check("bytes", entry.get("bytes"), source), digest
    return _COUNT.check("step", found.get("step"), str(path)), files


def _digests(paths: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of files; the processes share the reading, and all get every answer."""
    mine: dict[Path, str] = {}
    with processes.together():
        mine = {path: sha256(path) for path in paths[processes.rank() :: processes.world()]}
    return {path: digest for part in processes.all_gather(mine) for path, digest in part.items()}
