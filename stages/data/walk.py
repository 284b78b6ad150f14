"""The files of a folder that people put there, without what operating systems and notebooks leave between them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lfq_tokenizer import limits
from lfq_tokenizer.files import inside
from lfq_tokenizer.json_file import read_bytes
from lfq_tokenizer.text import printable
from stages.data.picture import ENDINGS, BrokenPicture

SYSTEM = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found", "icon\r"}
SYSTEM |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "__pycache__"}
# pictures of formats that are not read: counted and named, not passed over
UNREAD = frozenset(("heic", "heif", "hif", "heics", "jxl", "jp2", "j2k", "jpx", "jpf", "svg", "svgz", "psd", "psb", "ico"))
UNREAD |= {"tga", "ppm", "pgm", "pbm", "pnm", "pcx", "exr", "hdr", "eps", "xcf", "raw", "cr2", "cr3", "nef", "arw", "dng", "orf"}
UNREAD |= {"rw2", "raf", "pef", "srw", "x3f", "3fr"}


def is_hidden(name: str) -> bool:
    """Whether a name, or the name of a folder in it, is hidden or belongs to an operating system."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in SYSTEM for part in parts)


@dataclass
class Listing:
    """`pictures` of a folder by their names in it, each with the name of its .txt file or None. `unread`: pictures of formats
    that are not read, with the reason. `passed` counts everything else that was not looked at."""

    pictures: dict[str, str | None] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)


def listing(folder: Path, ignore: Sequence[str] = ()) -> Listing:
    """All files below a folder, in order; links to folders are not followed. `ignore`: names that were asked for otherwise."""
    found = Listing()
    names: list[str] = []

    def unreadable(error: OSError) -> None:
        found.passed["folders that cannot be opened"] += 1

    for place, folders, files in os.walk(folder, onerror=unreadable):
        found.passed["hidden files and folders"] += sum(map(is_hidden, (*folders, *files)))
        found.passed["links to folders"] += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        folders[:] = [name for name in folders if not is_hidden(name)]
        start = Path(place).relative_to(folder)
        names += [(start / name).as_posix() for name in files if not is_hidden(name)]
    names.sort(key=lambda name: name.split("/"))
    texts = {_stem(name): name for name in names if ending_of(name) == "txt"}
    texts |= {name.removesuffix(".txt"): name for name in names if name.endswith(".txt")}  # before .TXT
    used: set[str] = set()
    for name in names:
        ending, text = ending_of(name), texts.get(_stem(name))
        if ending in ENDINGS:
            found.pictures[name] = text
            used.add(text or "")
    rest = [name for name in names if name not in found.pictures and name not in ignore]
    for name in rest:
        ending, text = ending_of(name), texts.get(_stem(name))
        if ending in UNREAD or (text and ending != "txt" and text not in used):
            found.unread[name] = f"ending .{ending} is not read" if ending else "no ending"
    used |= {texts.get(_stem(name), "") for name in found.unread}
    for name in rest:
        if name not in found.unread and name not in used:
            found.passed[f".{ending_of(name)} files" if ending_of(name) else "files without an ending"] += 1
    found.passed = +found.passed
    return found


def ending_of(name: str) -> str:
    """In lower case, without the dot."""
    return PurePosixPath(name).suffix.removeprefix(".").lower()


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def shown_name(name: str) -> str:
    """A file's name as text: bytes that are none are written out (caf\\xe9.png)."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, in a table
        return printable(name)


def read_inside(folder: Path, name: str) -> bytes:
    """The bytes of a picture in a folder. BrokenPicture for one behind a link that leads out, one beyond the limit, and for what
    is no file; a device or pipe is never waited for."""
    path = within(folder, name)
    try:
        if not path.exists():
            raise BrokenPicture("missing", shown_name(name))
        if path.is_file() and path.stat().st_size > limits.PICTURE_BYTES:
            raise BrokenPicture("too large", f"{shown_name(name)}: {path.stat().st_size} bytes; {limits.PICTURE_BYTES} are read")
        return read_bytes(path, limits.PICTURE_BYTES)
    except OSError as error:
        raise BrokenPicture("cannot be read", f"{shown_name(name)}: {error.strerror}") from error
    except BrokenPicture:
        raise
    except ValueError:
        raise BrokenPicture("no regular file", shown_name(name)) from None


def within(folder: Path, name: str) -> Path:
    """The file that a name in a folder means, links followed. BrokenPicture where that lies outside."""
    try:
        return inside(folder / name, folder)
    except (OSError, ValueError, RuntimeError):  # the last for links in a circle
        raise BrokenPicture("outside the folder", shown_name(name)) from None
