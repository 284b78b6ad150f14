"""What there is to convert: the small files of a model folder, and its tensors by part, each read when it is wanted."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitdance.formats.stored import Held, open_stored, pieces
from bitdance.sizes import EXTRAS_FILE, HEAD_CONFIG, TOKENIZER_CONFIG, read_extras
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import read_weight_map

# Version of the map from tensor names here to those of the published files; 1 is the identity in every part and format.
KEY_MAP_VERSION = 1
TEXT, AUTOENCODER, HEAD, PROJECTOR = "text_encoder", "autoencoder", "diffusion_head", "projector"
STEMS = {TEXT: "model", AUTOENCODER: "ae", HEAD: "vision_head", PROJECTOR: "projector"}  # of the published weight files
TEXT_CONFIG = "config.json"
CONVERSION_FILE = "conversion.json"
SMALL_FILES = (".json", ".txt", ".jinja", ".model")


@dataclass
class Source:
    """`folder` has the published layout, its small files are copied. `parts`: part → tensor name → where it lies.
    `extras` is what bitdance.json shall say, None for what it says. `origin` goes into conversion.json."""

    folder: Path
    parts: dict[str, dict[str, Held]]
    extras: dict[str, Any] | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | str) -> "Source":
        """A model folder in either layout, or one with a tokenizer alone. FileNotFoundError or ValueError name the files and
        the first ten tensors that are missing or of a wrong shape; only headers are read."""
        from bitdance.checkpoint import check_folder, resolve

        folder = resolve(folder)
        alone = (folder / TOKENIZER_CONFIG).is_file() and not (folder / HEAD_CONFIG).is_file()
        alone = alone and "kind" not in read_extras(folder)  # a model of another kind, which check_folder refuses by its name
        if not alone:
            check_folder(folder)
        stems = {AUTOENCODER: STEMS[AUTOENCODER]} if alone else STEMS
        parts: dict[str, dict[str, Held]] = {part: dict(stored_tensors(folder, stem)) for part, stem in stems.items()}
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
        """Over names, dtypes, shapes and bytes of every tensor, whatever files they lie in."""
        digest = hashlib.sha256()
        for part, name, held in self.tensors():
            digest.update(f"{part}/{name} {held.dtype} {list(held.shape)}\n".encode())
            for piece in pieces(held):
                digest.update(piece.view(torch.uint8).numpy())
        return digest.hexdigest()

    def tensors(self) -> Iterator[tuple[str, str, Held]]:
        """(part, name, tensor) in a fixed order."""
        for part in sorted(self.parts):
            for name in sorted(self.parts[part]):
                yield part, name, self.parts[part][name]


def stored_tensors(folder: Path, stem: str) -> Mapping[str, Held]:
    """Name → tensor of the part whose files begin with `stem`: one file, or several that an index names."""
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file() or not index.is_file():
        return open_stored(folder / f"{stem}.safetensors")
    weight_map = read_weight_map(index)
    files = {name: open_stored(folder / name) for name in sorted(set(weight_map.values()))}
    if lost := [f"{name} in {file}" for name, file in weight_map.items() if name not in files[file]]:
        raise ValueError(f"{index} names weights that its files do not hold: {listed(lost)}")
    return {name: held for tensors in files.values() for name, held in tensors.items()}
