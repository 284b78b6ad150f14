"""Pieces of files, local or remote. Every process opens its own."""

from __future__ import annotations

import io
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from stages.data.locations import filesystem, is_url, shown

MOST_OPEN = 32
WAITS = (0.5, 2.0, 8.0)  # seconds before a failed request is tried again
_PASSING = (408, 425, 429)  # answers of the 400s that say: later
# A child process must not close what it inherits: it shares sockets and their poll with its parent.
_inherited: list[Any] = []

T = TypeVar("T")


class RemoteError(OSError):
    """A remote file cannot be read, after retries. It says nothing about the sample, so training stops."""


class ChangedShard(OSError):
    """A shard is not what it was when it was indexed; training stops."""


class File(Protocol):
    """`read` returns fewer bytes than asked only at the end of the file. `block` is how much is worth reading at once."""

    size: int
    block: int

    def read(self, offset: int, size: int) -> bytes: ...

    def close(self) -> None: ...


class LocalFile:
    block = 2**13

    def __init__(self, path: str) -> None:
        """OSError where the file cannot be opened; ValueError for a pipe or a device, which are never waited for."""
        self.handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        found = os.fstat(self.handle)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.handle)
            raise ValueError(f"{path} is no regular file; give a .tar file, a folder of them or an index file")
        self.size = found.st_size

    def read(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size and (piece := os.pread(self.handle, size - len(data), offset + len(data))):
            data += piece
        return data

    def close(self) -> None:
        os.close(self.handle)


class RemoteFile:
    """A file of an fsspec file system, by range requests. `RemoteError` names the URL."""

    block = 2**20

    def __init__(self, url: str, store: Any) -> None:
        self.url, self.store = url, store
        self._file: Any = None
        self.size: int = self._patiently(lambda: self._opened().seek(0, os.SEEK_END))

    def read(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        return self._patiently(lambda: self._read(offset, size)) if size > 0 else b""

    def _read(self, offset: int, size: int) -> bytes:
        file = self._opened()
        file.seek(offset)
        data = bytes(file.read(size))
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came instead of {size}")
        return data

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self.store.open(self.url, "rb", cache_type="none", block_size=self.block)
        return self._file

    def _patiently(self, action: Callable[[], T]) -> T:
        for wait in (*WAITS, None):
            try:
                return action()
            except Exception as error:  # every file system has its own
                self._file = None
                if wait is None or _lasting(error):
                    raise RemoteError(f"{shown(self.url)} cannot be read: {_explained(error)}") from error
                time.sleep(wait)
        raise AssertionError

    def close(self) -> None:
        self._file = None


def _lasting(error: Exception) -> bool:
    """Whether trying again is of no use."""
    status = getattr(_cause(error), "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _PASSING
    return isinstance(_cause(error), (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, NotImplementedError))


def _cause(error: Exception) -> BaseException:
    # fsspec reports any failure of the first request as a missing file
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def _explained(error: Exception) -> str:
    cause = _cause(error)
    if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
        return "there is no such file"
    if isinstance(cause, ValueError):
        return f"the server must state sizes and answer range requests ({cause})"
    status = getattr(cause, "status", None)
    return f"the server answers {status}" if isinstance(status, int) else f"{cause!r}"


class OpenFiles:
    """The open files of this process, at most `MOST_OPEN`; a copy for another process opens its own."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, File] = OrderedDict()
        self._stores: dict[tuple[str, str], Any] = {}
        self._process = os.getpid()

    def open(self, address: str) -> File:
        """The file at an address; OSError where it cannot be opened."""
        if self._process != os.getpid():
            _inherited.append((self._files, self._stores))
            self._files, self._stores, self._process = OrderedDict(), {}, os.getpid()
        if address not in self._files:
            if len(self._files) == MOST_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[address] = RemoteFile(address, self._store(address)) if is_url(address) else LocalFile(address)
        self._files.move_to_end(address)
        return self._files[address]

    def read(self, address: str, length: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of a file that was `length` bytes long. ChangedShard where it is not any more."""
        file = self.open(address)
        data = file.read(offset, size) if file.size == length else b""
        if len(data) < size or file.size != length:
            raise ChangedShard(f"{shown(address)} was changed after it was indexed; it had {length} bytes then. Index it again.")
        return data

    def _store(self, url: str) -> Any:
        place = urlsplit(url)[:2]
        if place not in self._stores:
            self._stores[place] = filesystem(url)
        return self._stores[place]

    def close(self) -> None:
        """Close the files of this process; a later read opens them again."""
        if self._process == os.getpid():
            for file in self._files.values():
                file.close()
            self._files, self._stores = OrderedDict(), {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": OrderedDict(), "_stores": {}, "_process": -1}


class _Raw(io.RawIOBase):
    def __init__(self, file: File) -> None:
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.file.size}[whence]
        if self.place < 0:
            raise ValueError(f"seek to {self.place}")
        return self.place

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(self.place, len(buffer))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def stream(file: File) -> io.BufferedReader:
    """A file to read through from the front; closing it leaves `file` open."""
    return io.BufferedReader(_Raw(file), file.block)
