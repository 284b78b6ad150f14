"""One process at a time in a folder."""

import errno
import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lfq_tokenizer.json_file import parse_json
from lfq_tokenizer.text import printable


class Locked(ValueError):
    """Somebody else is at work in a folder. `.owner` is what its lock says: process, host, command, parent."""

    def __init__(self, message: str, owner: dict[str, Any]) -> None:
        super().__init__(message)
        self.owner = owner


class FolderLock:
    """`with FolderLock(folder):` keeps every other process out of the same block, on this machine or on another that
    shares the disk.

    The kernel releases the lock when its process ends, however it ends, so a dead owner never has to be dealt with. The
    file says who holds it. Children that are forked do not hold it. `shared`: holders of a shared lock keep out an
    exclusive one and not each other. `Locked` names the owner, with what it `said` beside. On a disk without locks nobody is
    kept out.
    """

    def __init__(self, folder: Path, name: str = ".lock", shared: bool = False, said: Mapping[str, Any] | None = None) -> None:
        self.path, self.shared, self.said = Path(folder) / name, shared, dict(said or {})
        self._descriptor: int | None = None
        self._pid = 0

    def __enter__(self) -> "FolderLock":
        try:
            import fcntl
        except ImportError:  # Windows
            return self
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        while self._descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    owner = _owner(descriptor)
                    os.close(descriptor)
                    raise Locked(self._refusal(owner), owner) from None
                # a disk without locks: go on without one
            # whoever held it before may have removed the file between our opening and locking it
            if _same_file(descriptor, self.path):
                self._descriptor = descriptor
            else:
                os.close(descriptor)
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._forget)
        if not self.shared:
            record = {"pid": os.getpid(), "host": socket.gethostname(), "parent": os.getppid()}
            record |= {"command": " ".join(sys.argv)[:500], **self.said}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, (json.dumps(record) + "\n").encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is None or self._pid != os.getpid():
            return
        with suppress(OSError):  # while it is still held by nobody else, so that nobody else's is removed
            if self.shared:
                import fcntl

                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink()
        self._forget()

    def _forget(self) -> None:
        """Close the file. In a forked child this gives nothing back: the lock stays with its process."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _refusal(self, owner: dict[str, Any]) -> str:
        who = f"process {owner['pid']} on {printable(owner['host'])}" if owner else "another process"
        command = f" ({printable(owner['command'])[:200]})" if owner.get("command") else ""
        return f"{self.path.parent} is in use by {who}{command}; wait until it ends, end it, or choose another folder"


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        found = parse_json(os.pread(descriptor, 4096, 0), "lock")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) and isinstance(found.get("host"), str) else {}


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        here, there = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
