"""What lies in a model folder, told from file names, headers and configs alone: no weight is loaded."""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from bitdance.checkpoint import HEAD_WEIGHTS, LM_INDEX, LM_WEIGHTS, PROJECTOR_WEIGHTS, TOKENIZER_WEIGHTS
from bitdance.sizes import EXTRAS_FILE
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.weights import read_shapes

_WHOLE = 64 * 2**20  # files up to this size are hashed whole
_SAMPLES, _SAMPLE = 64, 2**20


@dataclass(frozen=True)
class Part:
    """One network of the model: its parameter count and files."""

    name: str
    parameters: int
    files: tuple[Path, ...]


def parts(folder: Path) -> list[Part]:
    """Backbone, head, projector and tokenizer. The folder has been through `bitdance.checkpoint.check_folder`."""
    if (folder / LM_WEIGHTS).is_file():
        backbone = [LM_WEIGHTS]
    else:
        backbone = sorted(set(read_json(folder / LM_INDEX)["weight_map"].values()))
    named = {
        "backbone": backbone,
        "head": [HEAD_WEIGHTS],
        "projector": [PROJECTOR_WEIGHTS],
        "tokenizer": [TOKENIZER_WEIGHTS],
    }
    return [
        Part(name, sum(map(_parameters, files)), files)
        for name, files in ((name, tuple(folder / file for file in files)) for name, files in named.items())
    ]


def _parameters(path: Path) -> int:
    return sum(math.prod(shape) for shape in read_shapes(path).values())


def fingerprint(folder: Path) -> str:
    """16 hex digits that change with the weights, the configs or the text tokenizer, wherever the folder lies.

    Small files count whole, weights over 64 MiB by their size and 64 evenly spaced pieces of 1 MiB (first and last
    included), so that 30 GB take a moment. `bitdance.json` (defaults, card) changes no picture and is left out.
    """
    digest = hashlib.sha256()
    kinds = (".safetensors", ".json", ".txt")
    for path in sorted(p for p in folder.iterdir() if p.suffix in kinds and p.is_file() and p.name != EXTRAS_FILE):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek(i * (size - _SAMPLE) // (_SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
