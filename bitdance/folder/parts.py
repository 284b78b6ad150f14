"""The parts of a text model and the files of its folder: every name stands here, once.

A part is called as `BitDanceModel` calls it: backbone, head, projector, tokenizer.
"""

import math
from pathlib import Path
from typing import Any

from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.weights import read_shapes, read_weight_map

BACKBONE, HEAD, PROJECTOR, TOKENIZER = "backbone", "head", "projector", "tokenizer"
STEMS = {BACKBONE: "model", TOKENIZER: "ae", HEAD: "vision_head", PROJECTOR: "projector"}  # of the published weight files
# The same parts in the diffusers layout; fingerprints and conversion.json hash tensors under these names.
DIFFUSERS = {BACKBONE: "text_encoder", TOKENIZER: "autoencoder", HEAD: "diffusion_head", PROJECTOR: "projector"}
LM_CONFIG, LM_WEIGHTS, LM_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD_CONFIG, HEAD_WEIGHTS = "vision_head_config.json", "vision_head.safetensors"
PROJECTOR_WEIGHTS = "projector.safetensors"
TOKENIZER_CONFIG, TOKENIZER_WEIGHTS = "ae_config.json", "ae.safetensors"
EXTRAS_FILE, CONVERSION_FILE, CARD_FILE = "bitdance.json", "conversion.json", "README.md"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEMO = Path(__file__).parents[1] / "pretrained" / "demo"


def read_extras(folder: Path) -> dict[str, Any]:
    """`bitdance.json` of a folder, {} where there is none."""
    path = folder / EXTRAS_FILE
    extras = read_json(path) if path.is_file() else {}
    if not isinstance(extras, dict):
        raise ValueError(f"{path} holds a {type(extras).__name__}; expected a JSON object")
    return extras


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of the part whose names begin with `stem`: one, or several that an index names, all in `folder`."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    return [folder / name for name in sorted(set(read_weight_map(index).values()))]


def part_files(folder: Path) -> dict[str, list[Path]]:
    """Part → its weight files in a folder of the published layout."""
    return {part: weight_files(folder, STEMS[part]) for part in (BACKBONE, HEAD, PROJECTOR, TOKENIZER)}


def parameters(folder: Path) -> dict[str, int]:
    """Part → its parameters, told from headers."""
    return {part: sum(map(count_parameters, files)) for part, files in part_files(folder).items()}


def count_parameters(path: Path) -> int:
    """How many numbers a weight file holds, told from its header."""
    return sum(math.prod(shape) for shape in read_shapes(path).values())


def is_tokenizer_alone(folder: Path) -> bool:
    """Whether a folder holds a picture tokenizer and no model around it, as training a tokenizer leaves it."""
    alone = (folder / TOKENIZER_CONFIG).is_file() and not (folder / HEAD_CONFIG).is_file()
    return alone and "kind" not in read_extras(folder)


def file_sizes(folder: Path) -> dict[str, int]:
    """File → bytes, for every file that lies directly in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
