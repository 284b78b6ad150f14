"""Pictures wherever they lie: the npz of ADM's evaluator, a folder, or shards; never all in memory at once."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance.values import shown
from lfq_tokenizer.json_file import parse_json, read_json
from stages.data.shards import ShardDataset, ShardIndex

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 32


@dataclass(frozen=True)
class Pictures:
    """`len` pictures, in the order of the npz, of their names, or of the shards. `model`: fingerprint of what made them,
    `settings` of sampling, `prompts` by file; empty where nobody says."""

    place: str
    count: int
    files: tuple[Path, ...] = ()
    npz: Path | None = None
    shards: ShardDataset | None = None
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, place: str) -> "Pictures":
        """An npz, a folder of pictures or of `evaluate run`, or shards. FileNotFoundError or ValueError say what is expected."""
        path = Path(place)
        if path.is_dir() and (path / "evaluation.json").is_file():
            said = read_json(path / "evaluation.json")
            known = said if isinstance(said, dict) else {}
            if not isinstance(known.get("fingerprint"), str) or not isinstance(known.get("settings"), dict):
                raise ValueError(f"{path / 'evaluation.json'} holds {shown(said)}, not what `bitdance evaluate run` writes")
            found = cls.of(str(path / "pictures"))
            return cls(**{**vars(found), "place": place, "model": known["fingerprint"], "settings": known["settings"]})
        if path.is_dir() and not any(path.glob("*.tar")):
            files = tuple(sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.name != "grid.png"))
            if not files:
                raise ValueError(f"{place} holds no pictures ({', '.join(ENDINGS)})")
            return cls(place, len(files), files, prompts=_prompts(path))
        if path.suffix == ".npz":
            try:
                with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                    return cls(place, _header(member, place)[0], npz=path)
            except (KeyError, zipfile.BadZipFile) as error:
                raise ValueError(f"{place} is no npz with pictures as arr_0 ({error}); write it again") from None
        if path.exists() or "*" in place:
            data = ShardDataset(ShardIndex.open((place,)))
            return cls(place, len(data), shards=data)
        raise FileNotFoundError(f"{place} does not exist; give an npz, a folder of pictures, or shards")

    def __len__(self) -> int:
        return self.count

    def batches(self) -> Iterator[Tensor]:
        """uint8 (B,3,H,W), pictures of one size together, in order."""
        waiting: list[np.ndarray] = []
        for picture in self._each():
            if waiting and (waiting[0].shape != picture.shape or len(waiting) == BATCH):
                yield _batch(waiting)
                waiting = []
            waiting.append(picture)
        if waiting:
            yield _batch(waiting)

    def _each(self) -> Iterator[np.ndarray]:
        """(H,W,3) uint8."""
        for file in self.files:
            yield np.asarray(opened(file))
        if self.npz is not None:
            with zipfile.ZipFile(self.npz) as archive, archive.open("arr_0.npy") as member:
                count, *shape = _header(member, self.place)
                for _ in range(count):
                    content = member.read(int(np.prod(shape)))
                    if len(content) != int(np.prod(shape)):
                        raise ValueError(f"{self.place}: arr_0 ends before its {count:,} pictures do; write it again")
                    yield np.frombuffer(content, np.uint8).reshape(shape)
        if self.shards is not None:
            for number in range(self.count):
                sample = self.shards.take(number)
                if sample.picture is None:
                    raise ValueError(f"{self.place}: sample {sample.key} holds bits and no picture")
                yield np.asarray(sample.picture.convert("RGB"))


def opened(file: Path) -> Image.Image:
    """An RGB picture as it lies in the file. ValueError names one that cannot be read."""
    try:
        with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable picture ({error})") from None


def _header(member: Any, place: str) -> tuple[int, ...]:
    """The shape (N,H,W,3) of pictures in an npy. ValueError for any other array."""
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except ValueError as error:
        raise ValueError(f"{place}: arr_0 is no array of numpy ({error}); write it again") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
        raise ValueError(f"{place}: arr_0 is {dtype} of shape {shape}; uint8 (pictures, height, width, 3) is expected")
    return tuple(int(side) for side in shape)


def _batch(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _prompts(folder: Path) -> dict[str, str]:
    """Of the manifest that `bitdance generate` writes beside its pictures."""
    manifest, found = folder / "manifest.jsonl", {}
    for line in manifest.read_bytes().split(b"\n") if manifest.is_file() else []:
        try:
            row = parse_json(line, manifest)
            found[str(row["file"])] = str(row["prompt"])
        except (ValueError, KeyError, TypeError):  # a torn line, or a class
            continue
    return found
