"""`bitdance convert --family imagenet`: a published class-conditional model → a model folder of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdance.folder.picture_model import check_new
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.kinds.class_patch.published import PARTS as PARTS
from bitdance.kinds.class_patch.published import read_published


def convert(file: Path, out: Path, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Write the folder `out`, whole or not at all; tensors keep value and dtype. What was found, for a reader.

    FileNotFoundError or ValueError name the file that is missing, broken or does not fit, and `out` where it holds anything.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the published .pt of a class-conditional model")
    check_new(out)
    found = read_published(file, parts)
    LAYOUT.save(found.model, out)
    network, config = found.model.network, found.model.network.config
    return {
        "model": str(out),
        "published model": found.published or "none of this shape",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tokenizer parameters": sum(parameter.numel() for parameter in found.model.tokenizer.parameters()),
        "picture": "×".join(map(str, found.model.sizes[0])),
        "tokens per step": config.parallel_num,
        "classes": config.num_classes,
        "weights from": found.weights_from,
        "tokenizer from": found.tokenizer_from,
        "names from": found.names_from,
    }
