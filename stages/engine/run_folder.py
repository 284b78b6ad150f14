"""The folder of a run belongs to one run at a time; what an earlier one left unfinished is cleared by the next.

Process 0 holds the lock. It is the kernel's, so it ends with its process, and loader processes do not inherit it.
"""

import errno
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lfq_tokenizer.files import INCOMPLETE, DiskFull, clear_leftovers, disk_full
from lfq_tokenizer.lock import FolderLock, Locked
from lfq_tokenizer.text import printable
from stages.engine import processes

PATIENCE = 60.0  # seconds that an owner whose launcher has ended is given to save and end


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The block has the run's folder for itself. ValueError, on every process, that names the owner while another run has it.

    An owner whose launcher is gone saves and ends (`engine.py`): it is waited for.
    """
    lock = FolderLock(folder, said={"launcher": processes.LAUNCHER})
    with processes.together():
        if processes.rank() == 0:
            with naming_full(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _take(lock)
                _clear(folder)
    try:
        yield
    finally:
        lock.__exit__()


@contextmanager
def naming_full(target: Path) -> Iterator[None]:
    """A write to `target` that fails for want of room does so with the one message of `files.disk_full`, which names no hidden
    file on the way to it."""
    try:
        yield
    except Exception as error:
        hidden = isinstance(error, DiskFull) and INCOMPLETE in str(error)
        if full := disk_full(OSError(errno.ENOSPC, "") if hidden else error, target):
            raise full from None
        raise


def _take(lock: FolderLock) -> None:
    begun, told = time.monotonic(), False
    while True:
        try:
            lock.__enter__()
            return
        except Locked as locked:
            # an owner without a name has taken the lock just now, or is about to give it back
            patience = PATIENCE if _orphan(locked.owner) else 0.0 if locked.owner else 2.0
            if time.monotonic() - begun > patience:
                raise ValueError(_refusal(lock.path.parent, locked.owner)) from None
            if locked.owner and not told:
                who = _named(locked.owner)
                words = f"{lock.path.parent} belongs to {who}, whose launcher is gone: it saves and ends; waiting for it"
                print(words, file=sys.stderr, flush=True)
                told = True
        time.sleep(0.2)


def _orphan(owner: dict[str, Any]) -> bool:
    """Whether the launcher of the owner has ended; False where that cannot be seen from here."""
    launcher = owner.get("launcher")
    if not isinstance(launcher, int) or owner.get("host") != socket.gethostname():
        return False
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{owner['pid']}/stat").read_text().rpartition(")")[2].split()[1]) != launcher
    return False


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    if not owner:
        return f"{folder} is in use by another run; wait until it ends, or choose another run.out"
    here = owner["host"] == socket.gethostname()
    end = f"end it with `kill {owner['pid']}`{'' if here else ' there'}, upon which it saves first"
    return f"{folder} is in use by {_named(owner)}; wait until it ends, {end}, or choose another run.out"


def _named(owner: dict[str, Any]) -> str:
    command = f" ({printable(owner['command'])[:200]})" if owner.get("command") else ""
    return f"process {owner['pid']} on {printable(owner['host'])}{command}" if owner else "another run"


def _clear(folder: Path) -> None:
    """Whatever was being written here is nobody's any more, now that the folder is ours; other programs that write into it (an
    export, say) are left alone while they live."""
    clear_leftovers(folder)
    for path in [*folder.glob(f".step_*{INCOMPLETE}*"), *folder.glob("step_*.incomplete")]:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("latest.tmp", "config.json.tmp"):  # of earlier versions
        with suppress(OSError):
            os.unlink(folder / name)
    if (samples := folder / "samples").is_dir():
        clear_leftovers(samples)
