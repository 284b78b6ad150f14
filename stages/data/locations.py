"""Where shards lie: files, patterns and folders of this machine, or URLs of a few schemes.

The address of a shard is a path or a URL. No address is ever a command: schemes outside `SCHEMES` (`pipe:`, `ssh:`) and
chained URLs (`a::b`) are refused.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from lfq_tokenizer import limits

SCHEMES = {  # scheme → the package that reads it
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hdfs": "pyarrow",
    "memory": "fsspec",
}
INDEX_ENDING = ".jsonl"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")

Locations = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_shards(places: Locations) -> list[str]:
    """Locations → addresses of shards and of index files, each once, in order.

    A place is a file, a pattern, a folder of `.tar` files (or of folders with them), or a URL; `{000..099}` stands for a hundred
    names. ValueError for a URL that is not allowed or cannot be listed; FileNotFoundError where a place matches nothing.
    """
    found: dict[str, None] = {}
    for place in [places] if isinstance(places, (str, os.PathLike)) else places:
        text = os.fspath(place)
        if text.startswith("file:///"):
            text = unquote(urlsplit(text).path)
        found.update(dict.fromkeys(_find_remote(text) if is_url(text) else _find_local(text)))
    if not found:
        raise FileNotFoundError("no shards were named; give .tar files, a pattern, a folder of shards or URLs")
    return list(found)


def is_url(text: str) -> bool:
    """Whether an address is a URL and no path; ValueError for a URL that is not allowed."""
    match = _SCHEME.match(text)
    if match is None:
        return False
    scheme = match[1].lower()
    if scheme not in SCHEMES or not text[match.end() :].startswith("//") or "::" in text:
        raise ValueError(
            f"shards {shown(text)!r}: no such URL and no command is read; allowed are files of this machine and URLs that "
            f"start with {', '.join(f'{name}://' for name in SCHEMES if name != 'memory')}"
        )
    return True


def shown(address: str) -> str:
    """An address for messages: without the password or the signature that a URL may hold."""
    return re.sub(r"://[^/@]*@", "://", address.split("?")[0]) if "://" in address else address


def name_of(address: str) -> str:
    """The file name of an address."""
    return posixpath.basename(urlsplit(address).path) if is_url(address) else os.path.basename(address)


def beside(index: str, name: str) -> str:
    """The address of a shard that the index file at `index` calls `name`: below the index file's own folder, or absolute.

    ValueError for a name that leads out of the folder, and for one by which an index from elsewhere would name a file of
    this machine.
    """
    remote = is_url(index)
    if is_url(name):
        if remote and urlsplit(name).scheme.lower() == "memory" != urlsplit(index).scheme.lower():
            raise ValueError(f"{shown(index)} names {shown(name)!r}, which lies on this machine; index the shards again")
        return name
    if os.path.isabs(name) or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        if os.path.isabs(name) and not remote:
            return name
        raise ValueError(f"{shown(index)} names {name[:200]!r}, which leads out of its folder; index the shards again")
    if remote:
        folder, mark, query = index.partition("?")
        return folder.rpartition("/")[0] + "/" + name + mark + query
    return os.path.join(os.path.dirname(index), name)


def filesystem(url: str) -> Any:
    """A file system of its own for `url` (fsspec keeps none of it). ValueError that says what to install."""
    scheme = urlsplit(url).scheme.lower()
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, skip_instance_cache=True)[0]
    except ImportError as error:
        raise ValueError(f"{shown(url)} needs another package ({error}); pip install fsspec {SCHEMES[scheme]}") from error


def _find_local(text: str) -> list[str]:
    text = os.path.expanduser(text)
    named = [text] if os.path.exists(text) else [match for pattern in _expanded(text) for match in sorted(glob.glob(pattern))]
    matches = [shard for match in named for shard in (_in_folder(match) if os.path.isdir(match) else [match])]
    if not matches:
        raise FileNotFoundError(
            f"no shard at {text!r}; give .tar files, a pattern such as 'shards/*.tar', a folder of shards or a URL"
        )
    return matches


def _in_folder(folder: str) -> list[str]:
    """The shards of a folder or, where it has none of its own, of the folders in it."""
    inside = glob.escape(folder)
    return sorted(glob.glob(os.path.join(inside, "*.tar"))) or sorted(glob.glob(os.path.join(inside, "*", "*.tar")))


def _find_remote(text: str) -> list[str]:
    found: list[str] = []
    for url in _expanded(text):
        wild = re.search(r"[*?\[]", url) is not None
        if urlsplit(url).scheme.lower() in ("http", "https"):
            if "*" in url or urlsplit(url).path.endswith("/"):
                raise ValueError(
                    f"shards {shown(text)!r}: HTTP cannot list files; write out the names, such as shard-{{000..099}}.tar, "
                    f"or give an index file ({INDEX_ENDING})"
                )
            found.append(url)
        elif url.endswith((".tar", INDEX_ENDING)) and not wild:
            found.append(url)
        else:
            found += _listed(url, wild)
    return found


def _listed(url: str, wild: bool) -> list[str]:
    store = filesystem(url)
    pattern = url if wild else url.rstrip("/") + "/*.tar"
    stripped = store._strip_protocol(pattern)
    try:
        matches = sorted(store.glob(pattern))
    except Exception as error:  # every file system has its own
        raise OSError(f"{shown(url)} cannot be listed: {error}") from error
    if not matches:
        raise FileNotFoundError(f"no shard at {shown(url)!r}; give .tar files, a pattern or a folder of shards")
    if pattern.endswith(stripped):  # keeps the host that a file system may strip
        return [pattern.removesuffix(stripped) + match for match in matches]
    return [store.unstrip_protocol(match) for match in matches]


def _expanded(text: str) -> list[str]:
    if "{" not in text:
        return [text]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise ValueError(f"{shown(text)!r}: braces need another package ({error}); pip install braceexpand") from error
    if _most_names(text) > limits.SHARD_NAMES:
        raise ValueError(
            f"{shown(text)[:200]!r}: its braces stand for more than {limits.SHARD_NAMES:,} names; name fewer, give a pattern "
            f"with *, or an index file ({INDEX_ENDING})"
        )
    return list(braceexpand(text))


def _most_names(text: str) -> int:
    """A bound for how many names braces stand for: each range and each list counted as if all others came together with it."""
    names, commas = 1, [0]
    for piece in re.findall(r"\\.|\{|\}|,|[^{},\\]+", text, re.DOTALL):
        if piece == "{":
            commas.append(0)
        elif piece == "}" and len(commas) > 1:
            names *= commas.pop() + 1
        elif piece == ",":
            commas[-1] += 1
        elif ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", piece):
            if len(piece) > 60:
                return limits.SHARD_NAMES + 1
            names *= abs(int(ends[1]) - int(ends[2])) // max(1, int(ends[3] or 1)) + 1
        if names > limits.SHARD_NAMES:
            break
    return names
