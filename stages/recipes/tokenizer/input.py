"""What `bitdance tokenizer` reads: shards, folders of pictures, single pictures."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stages.data.caption_text import UNCONDITIONAL
from stages.data.folder import shard_key, text_captions
from stages.data.picture import ENDINGS, BrokenPicture, decode_picture
from stages.data.sample import Skipped
from stages.data.shards import Sample, ShardDataset, ShardIndex
from stages.data.walk import ending_of, listing, read_inside, shown_name


class TokenizerInput:
    """`input[i]` → `Sample`, from any mixture of shards, folders and picture files.

    A place is a folder with `*.tar` files, a folder of pictures (searched recursively), a picture or a pattern for pictures, or
    what `ShardIndex.open` takes. Pictures outside shards get their captions from a .txt of the same name (one a line), and where
    there is none one empty caption, on which a generator trains its unconditional prompt. FileNotFoundError or ValueError for a
    place that holds nothing; `input[i]` raises ValueError where a sample cannot be read.
    """

    def __init__(self, places: Sequence[str | os.PathLike[str]]) -> None:
        shards: list[str] = []
        self._files: list[tuple[Path, str, str | None, str]] = []  # folder, file in it, its captions' file, key
        self.passed: Counter[str] = Counter()
        keys: set[str] = set()
        for place in places:
            text = os.path.expanduser(os.fspath(place))
            found = _pictures(text, self.passed)
            if found is None:
                shards.append(text)
                continue
            for folder, name, captions in found:
                key = shard_key(name)
                if key in keys:  # the same name in another folder
                    key = shard_key(f"{folder.as_posix()}/{name}")
                keys.add(key)
                self._files.append((folder, name, captions, key))
        self.data = ShardDataset(ShardIndex.open(shards)) if shards else None
        self.left_out = self.data.index.left_out if self.data is not None else {}

    def __len__(self) -> int:
        return len(self._files) + (len(self.data) if self.data is not None else 0)

    def name(self, number: int) -> str:
        """For messages: shard and key, or the file's name."""
        if self.data is not None and number < len(self.data):
            return self.data.name(number)
        return shown_name(self._files[number - (len(self.data) if self.data is not None else 0)][1])

    def __getitem__(self, number: int) -> Sample:
        if self.data is not None and number < len(self.data):
            return self.data[number]
        folder, name, text, key = self._files[number - (len(self.data) if self.data is not None else 0)]
        if ending_of(name) not in ENDINGS:
            raise BrokenPicture(f"ending .{ending_of(name)} is not read", shown_name(name))
        picture = decode_picture(read_inside(folder, name), notes=self.passed)
        captions = text_captions(folder, text) if text else []
        return Sample(key, picture, None, captions or list(UNCONDITIONAL), {"file": shown_name(name)})

    def samples(self, usable: Callable[[Sample], str]) -> Iterator[Sample | Skipped]:
        """All of them in order; `usable` names the reason to skip one, or "". Reading errors are skipped too."""
        for number in range(len(self)):
            try:
                sample = self[number]
            except ValueError as error:
                yield Skipped(self.name(number), getattr(error, "reason", "cannot be read"), str(error))
                continue
            reason = usable(sample)
            yield Skipped(self.name(number), reason) if reason else sample


def _pictures(place: str, passed: Counter[str]) -> list[tuple[Path, str, str | None]] | None:
    """(folder, file in it, the file of its captions) of the pictures that a place means; None where it means shards."""
    if os.path.isdir(place):
        if glob.glob(os.path.join(glob.escape(place), "*.tar")):
            return None
        folder = Path(place).resolve()
        found = listing(folder)
        passed.update(found.passed)
        if not found.pictures:
            raise ValueError(f"{place} holds no PNG, JPEG or WebP file and no shard (*.tar), nor GIF, BMP, TIFF or AVIF")
        # what is not read becomes a sample that cannot be used, so that it is counted
        return [(folder, name, text) for name, text in [*found.pictures.items(), *((name, None) for name in found.unread)]]
    matches = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))
    if not any(ending_of(match) in ENDINGS for match in matches):
        return None
    files = [Path(match) for match in matches if not os.path.isdir(match)]
    return [(path.parent.resolve(), path.name, _text_beside(path)) for path in files]


def _text_beside(path: Path) -> str | None:
    return next((text.name for text in map(path.with_suffix, (".txt", ".TXT", ".Txt")) if os.path.lexists(text)), None)


def safe_key(key: str) -> str:
    """A key as the name of a file or of a sample: foreign shards may hold folders and dots in it."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else shard_key(key or "unnamed")
