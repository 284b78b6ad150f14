"""What `bitdance tokenizer` reads: shards, folders of pictures, single pictures."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stages.data.folder import ENDINGS, shard_key
from stages.data.metadata import MEMBER_LIMITS
from stages.data.picture import BrokenPicture, decode_picture
from stages.data.sample import Skipped
from stages.data.shards import Sample, ShardDataset, ShardIndex


class TokenizerInput:
    """`input[i]` → `Sample`, from any mixture of shards, folders and picture files.

    A place is a folder with `*.tar` files, a folder of pictures (searched recursively), a picture or a pattern for pictures, or
    what `ShardIndex.open` takes. Pictures outside shards get their captions from a .txt of the same name (one a line), and where
    there is none one empty caption, on which a generator trains its unconditional prompt. FileNotFoundError or ValueError for a
    place that holds nothing; `input[i]` raises ValueError where a sample cannot be read.
    """

    def __init__(self, places: Sequence[str | os.PathLike[str]]) -> None:
        shards: list[str] = []
        self._files: list[tuple[Path, str, str]] = []  # folder, file in it, key
        keys: set[str] = set()
        for place in places:
            text = os.path.expanduser(os.fspath(place))
            found = _pictures(text)
            if found is None:
                shards.append(text)
                continue
            for folder, name in found:
                key = shard_key(name)
                if key in keys:  # the same name in another folder
                    key = shard_key(f"{folder.as_posix()}/{name}")
                keys.add(key)
                self._files.append((folder, name, key))
        self.data = ShardDataset(ShardIndex.open(shards)) if shards else None
        self.left_out = self.data.index.left_out if self.data is not None else {}

    def __len__(self) -> int:
        return len(self._files) + (len(self.data) if self.data is not None else 0)

    def name(self, number: int) -> str:
        """For messages: the key in a shard, or the file's name."""
        inside = len(self.data) if self.data is not None else 0
        return self.data.key(number) if self.data is not None and number < inside else self._files[number - inside][1]

    def __getitem__(self, number: int) -> Sample:
        if self.data is not None and number < len(self.data):
            return self.data[number]
        folder, name, key = self._files[number - (len(self.data) if self.data is not None else 0)]
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise BrokenPicture("outside the folder", name)
        try:
            if path.stat().st_size > MEMBER_LIMITS["png"]:
                raise BrokenPicture("too large", name)
            return Sample(key, decode_picture(path.read_bytes()), None, _captions(path), {"file": name})
        except OSError as error:
            raise BrokenPicture("cannot be read", f"{name}: {error.strerror}") from error

    def samples(self, usable: Callable[[Sample], str]) -> Iterator[Sample | Skipped]:
        """All of them in order; `usable` names the reason to skip one, or "". Reading errors are skipped too."""
        for number in range(len(self)):
            try:
                sample = self[number]
            except ValueError as error:
                yield Skipped(self.name(number), getattr(error, "reason", "cannot be read"))
                continue
            reason = usable(sample)
            yield Skipped(self.name(number), reason) if reason else sample


def _pictures(place: str) -> list[tuple[Path, str]] | None:
    """(folder, file in it) of the pictures that a place means; None where it means shards."""
    if os.path.isdir(place):
        if glob.glob(os.path.join(glob.escape(place), "*.tar")):
            return None
        folder = Path(place).resolve()
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        if not paths:
            raise ValueError(f"{place} holds no PNG, JPEG or WebP file and no shard (*.tar)")
        return [(folder, path.relative_to(folder).as_posix()) for path in paths]
    matches = [place] if os.path.isfile(place) else sorted(glob.glob(place, recursive=True))
    if not any(Path(match).suffix.lower() in ENDINGS for match in matches):
        return None
    return [(Path(match).resolve().parent, Path(match).resolve().name) for match in matches if os.path.isfile(match)]


def _captions(path: Path) -> list[str]:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return [""]
    if text.stat().st_size > MEMBER_LIMITS["txt"]:
        raise BrokenPicture("captions too long", text.name)
    try:
        lines = text.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BrokenPicture("captions are not UTF-8", text.name) from error
    return [line.strip() for line in lines if line.strip()] or [""]


def safe_key(key: str) -> str:
    """A key as the name of a file or of a sample: foreign shards may hold folders and dots in it."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else shard_key(key or "unnamed")
