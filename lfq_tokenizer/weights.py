"""safetensors and JSON in and out: strict, atomic, with errors that name the file. Nothing here can execute code."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHOWN = 10  # offenders listed in an error


def read_json(path: Path | str) -> Any:
    """The JSON value of a file. FileNotFoundError or ValueError name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder in the published layout holds it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download or export it again") from error


def write_json(value: Any, path: Path | str) -> None:
    """Write JSON atomically: the file is either the old one or the whole new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, from the header only."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU, in the dtype on disk. Broken files raise ValueError with the file's name."""
    with _opened(path):
        pass
    return load_file(str(path))


def _opened(path: Path | str) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder in the published layout holds it")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}); download or export it again"
        ) from error


def write_safetensors(state: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically: the file is either the old one or the whole new one. `metadata` goes into its header."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(tensors, str(temporary), metadata={"format": "pt", **(metadata or {})})
    temporary.chmod(0o666 & ~_umask())  # the library writes it for its owner alone
    os.replace(temporary, path)


def _umask() -> int:
    """The permission bits that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: Path | str) -> str:
    """Of the whole file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. Nothing happens on Windows, where folders cannot be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(target: Path, needed: int) -> None:
    """ValueError when the disk has not room for `needed` bytes, and a little more, beside `target`."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed * 1.02 + 2**24:
        raise ValueError(f"{target} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room first")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, beside `target`, which gets that name when the block ends. If it fails nothing is left behind."""
    target = target.absolute()
    temporary = target.parent / f".{target.name}.incomplete-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Give the folder `new` the name `target`, by one rename. What stood there, and was not empty, comes back if that fails."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        os.replace(new, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def listed(items: Sequence[str], separator: str = "; ") -> str:
    """The first ten, and how many more there are."""
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Path | str) -> None:
    """ValueError listing the first ten names that are missing, unexpected or of another shape."""
    problems = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    problems += [f"unexpected {name} {list(found[name])}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit its config: {listed(problems)}. Weights and config must come from the same model."
        )


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load exactly these tensors into `module`, which keeps its own dtype and device. Any difference is an error."""
    check_shapes(
        {name: tuple(t.shape) for name, t in module.state_dict().items()},
        {name: tuple(t.shape) for name, t in state.items()},
        source,
    )
    module.load_state_dict(dict(state), strict=True)
