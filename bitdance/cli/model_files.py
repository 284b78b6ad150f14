"""What lies in a model folder, told from file names, headers and configs alone: no weight is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

from bitdance.checkpoint import HEAD_WEIGHTS, LM_INDEX, LM_WEIGHTS, PROJECTOR_WEIGHTS, TOKENIZER_WEIGHTS
from lfq_tokenizer.weights import read_shapes, read_weight_map


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
        backbone = sorted(set(read_weight_map(folder / LM_INDEX).values()))
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
