"""What there is to convert: the small files of a model folder, and its tensors by part, each read when it is wanted."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitdance.folder.config import check_folder, resolve
from bitdance.folder.parts import CONVERSION_FILE, DIFFUSERS, EXTRAS_FILE, STEMS, TOKENIZER, is_tokenizer_alone, read_extras
from bitdance.folder.stored import LazyTensor, pieces, stored_tensors

# Version of the map from tensor names here to those of the published files; 1 is the identity in every part and format.
KEY_MAP_VERSION = 1
SMALL_FILES = (".json", ".txt", ".jinja", ".model")


@dataclass
class StoredModel:
    """`folder` has the published layout, its small files are copied. `parts`: part → tensor name → where it lies.
    `extras` is what bitdance.json shall say, None for what it says. `origin` goes into conversion.json."""

    folder: Path
    parts: dict[str, dict[str, LazyTensor]]
    extras: dict[str, Any] | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | str) -> "StoredModel":
        """A model folder in either layout, or one with a tokenizer alone. FileNotFoundError or ValueError name the files and
        the first ten tensors that are missing or of a wrong shape; only headers are read."""
        folder = resolve(folder)
        if not (alone := is_tokenizer_alone(folder)):
            check_folder(folder)
        stems = {TOKENIZER: STEMS[TOKENIZER]} if alone else STEMS
        parts: dict[str, dict[str, LazyTensor]] = {part: dict(stored_tensors(folder, stem)) for part, stem in stems.items()}
        return cls(folder, parts, origin={"kind": "tokenizer" if alone else "model"})

    def is_pipeline(self) -> bool:
        """All parts are there, not a tokenizer alone."""
        return set(self.parts) == set(STEMS)

    def small_files(self) -> list[Path]:
        """Configs and the files of the text tokenizer."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in SMALL_FILES
            and not path.name.endswith(".safetensors.index.json")
            and path.name not in (CONVERSION_FILE, EXTRAS_FILE)
            and path.is_file()
        )

    def bitdance_json(self) -> dict[str, Any]:
        return read_extras(self.folder) if self.extras is None else self.extras

    def sha256(self) -> str:
        """The hash of names, dtypes, shapes and bytes of every tensor, whatever files they lie in."""
        digest = hashlib.sha256()
        for part, name, held in self.tensors():
            digest.update(f"{DIFFUSERS[part]}/{name} {held.dtype} {list(held.shape)}\n".encode())
            for piece in pieces(held):
                digest.update(piece.view(torch.uint8).numpy())
        return digest.hexdigest()

    def tensors(self) -> Iterator[tuple[str, str, LazyTensor]]:
        """(part, name, tensor) in a fixed order."""
        for part in sorted(self.parts, key=DIFFUSERS.__getitem__):
            for name in sorted(self.parts[part]):
                yield part, name, self.parts[part][name]
