"""`bitdance convert --family var|infinity`: published next-scale models → a model folder of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdance.folder.picture_model import check_new
from bitdance.kinds.next_scale.folder import LAYOUT
from bitdance.kinds.next_scale.published import PARTS as PARTS
from bitdance.kinds.next_scale.published import read_published


def convert(file: Path, out: Path, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Write the folder `out`, whole or not at all; tensors keep value and dtype. What was found, for a reader.

    FileNotFoundError or ValueError name the file that is missing, broken or does not fit, and `out` where it holds anything.
    """
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist; give the published .pth of a next-scale model, or the folder of its shards"
        )
    check_new(out)
    model, found = read_published(file, parts)
    LAYOUT.save(model, out)
    config = model.network.config
    return {
        "model": str(out),
        "published model": config.known[0] if config.known else "none of this shape",
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "tokenizer parameters": sum(parameter.numel() for parameter in model.tokenizer.parameters()),
        "picture": ", ".join(f"{w}×{h}" for h, w in model.sizes),
        "scales": len(config.sides),
        "tokens": config.token,
        **({} if model.names is None else {"classes": len(model.names)}),
        **found,
    }
