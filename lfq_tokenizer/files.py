"""Files and folders that are whole or absent, whoever else writes beside us.

What is being written has a hidden name that nobody can foresee: `.NAME.incomplete-HOST-PID-START-RANDOM`. It says whose it is, so
the next command clears what a killed one left behind.
"""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

INCOMPLETE = ".incomplete-"
_OWNER = re.compile("[0-9a-f]{8}-[0-9]{1,10}-[0-9]{1,20}-[0-9a-f]{16}")  # others are not ours to remove
_SPARE = 2**24  # bytes left free beside what is written
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def temporary_beside(path: Path) -> Path:
    """A hidden name beside `path` that nobody can foresee; it names this process, so that others know whether it lives."""
    return path.with_name(f"{_hidden(path.name)}{_me()}-{secrets.token_hex(8)}")


def _hidden(name: str) -> str:
    """How the hidden names for `name` begin: at most 120 bytes of it."""
    return f".{name.encode('utf-8', 'surrogateescape')[:120].decode('utf-8', 'ignore')}{INCOMPLETE}"


class DiskFull(OSError, ValueError):
    """There is no room for a file. The text says which, and what is free; what stood there before is untouched."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def whole_path(path: Path | str) -> Iterator[Path]:
    """A name beside `path` for a library to write a file under; the file gets the name `path`, once it is on disk, when
    the block ends.

    If that fails nothing is left behind and what stood at `path` stays. The file's mode follows the umask, and no link is
    written through. `DiskFull` names `path` and what is free.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())
        fsync(temporary)
        os.replace(temporary, path)
    except Exception as error:
        if full := disk_full(error, path):
            raise full from None
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def whole_file(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write in that becomes `path` as a whole or not at all; see `whole_path`."""
    with whole_path(path) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            yield file


def write_text(text: str, path: Path | str) -> None:
    """Write UTF-8 text atomically: the file is either the old one or the whole new one."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, beside `target`, which gets that name when the block ends. If it fails nothing is left
    behind, and the error names the file as it would have been called; what a killed command left there before is cleared first.
    Its mode follows the umask."""
    target = target.absolute()
    clear_leftovers(target.parent, target.name)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, target)
    except OSError as error:
        for name in ("strerror", "filename"):
            if str(temporary) in str(text := getattr(error, name)):
                setattr(error, name, str(text).replace(str(temporary), str(target)))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Give the folder `new` the name `target`, at one blow: at every moment `target` is the old one or the new one.

    Where the system cannot exchange two names, two renames do it, and what stood there comes back if the second fails.
    """
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        os.replace(new, target)
        return
    if _exchange(new, target):
        _remove(new)
        return
    old = temporary_beside(target)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    _remove(old)


def clear_leftovers(folder: Path, name: str | None = None) -> int:
    """Remove what dead processes of this machine left unfinished in `folder` (only for the file or folder `name`, where
    given); how many there were. What lives, or belongs to another machine, stays."""
    start = None if name is None else _hidden(name)
    count = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            _, found, owner = entry.name.rpartition(INCOMPLETE)
            ours = found and _OWNER.fullmatch(owner) and entry.name.startswith("." if start is None else start)
            if not ours or _lives(owner.rpartition("-")[0]):
                continue
            with suppress(OSError):
                _remove(Path(entry.path))
                count += 1
    return count


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def umask() -> int:
    """The permission bits that new files of this process do not get."""
    with suppress(OSError, ValueError, IndexError):  # asking the kernel does not change it for other threads, as os.umask does
        return int(Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _me() -> str:
    return f"{_host()}-{os.getpid()}-{_started(os.getpid())}"


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """When a process was started, in ticks; tells it from a later one of the same number. "0" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError, ValueError):
        return "0"


def _lives(owner: str) -> bool:
    """Whether the process that `HOST-PID-START` names may still be at work."""
    host, _, rest = owner.partition("-")
    pid, _, started = rest.partition("-")
    if host != _host():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return _started(int(pid)) in (started, "0")


def inside(path: Path | str, root: Path | str) -> Path:
    """The file that `path` means, links followed. ValueError when that lies outside of the folder `root`."""
    try:
        target, home = Path(path).resolve(), Path(root).resolve()
    except (RuntimeError, OSError):
        raise ValueError(f"{path} is a link that leads in a circle; put the file itself there") from None
    if not target.is_relative_to(home):
        raise ValueError(f"{path} is a link that leads out of {root}; nothing outside is read: put the file itself there")
    return target


_own_views: set[Path] = set()


def links_are_ours(folder: Path) -> None:
    """Say that this process made `folder`, a view of another whose own links were checked: its links may lead there."""
    _own_views.add(folder.resolve())


def check_links(folder: Path | str) -> None:
    """ValueError for a file of a model folder, or of a folder in it, that is a link which leads out of the folder:
    whoever made the folder could make others copy what they must not see.

    In the cache of a hub a snapshot's files are links into the folder of its repository, which counts as the folder then.
    """
    folder = Path(folder).resolve()
    if folder in _own_views:
        return
    repository = folder.parent.parent
    cached = folder.parent.name == "snapshots" and (repository / "blobs").is_dir() and repository.name.startswith("models--")
    root = repository if cached else folder
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if path.is_symlink():
            inside(path, root)


def sha256(path: Path | str) -> str:
    """SHA-256 of the whole file, in hexadecimal digits."""
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
    """`DiskFull`, which is a ValueError, when the disk has not room for `needed` bytes, and a little more, beside `target`."""
    free = _free(target)
    wanted = int(needed * 1.02) + min(_SPARE, needed + 2**16)
    if free < wanted:
        text = f"{target} needs {size_text(wanted)} and the disk has {size_text(free)} free; make room first"
        raise DiskFull(errno.ENOSPC, text)


def disk_full(error: BaseException, target: Path | str) -> DiskFull | None:
    """The error to raise for a write to `target` that failed for want of room (or of quota, or beyond a file's largest
    size); None when it failed for another reason. Libraries that hide the cause are told by their words."""
    if isinstance(error, DiskFull):
        return error
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 122", "os error 27")
    if not (isinstance(error, OSError) and error.errno in codes) and not any(word in str(error) for word in words):
        return None
    text = f"{target} could not be written: the disk is full, {size_text(_free(Path(target)))} free; make room and run it again"
    return DiskFull(errno.ENOSPC, text)


def _free(target: Path) -> int:
    return shutil.disk_usage(_existing(target)).free


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def size_text(count: int) -> str:
    """Bytes in the unit that fits: "512 bytes", "2.0 MB", "33.1 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} byte{'' if count == 1 else 's'}"
