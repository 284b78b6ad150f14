"""`bitdance convert --family grn`: published refinement models → a model folder of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdance.folder.picture_model import check_new
from bitdance.kinds.refine.config import published_name
from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.published import PARTS as PARTS
from bitdance.kinds.refine.published import read_published


def convert(file: Path, out: Path, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Write the folder `out`, whole or not at all; tensors keep value and dtype. What was found, for a reader.

    FileNotFoundError or ValueError name the file that is missing, broken or does not fit, and `out` where it holds anything.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the published .pth of a refinement model")
    check_new(out)
    model, found = read_published(file, parts)
    LAYOUT.save(model, out)
    config = model.network.config
    return {
        "model": str(out),
        "published model": published_name(config) or "none of this shape",
        "parameters": sum(tensor.numel() for tensor in model.network.state_dict().values()),
        "tokenizer parameters": sum(parameter.numel() for parameter in model.tokenizer.parameters()),
        "picture": ", ".join(f"{w}×{h}" for h, w in model.sizes),
        "labels": f"{config.label_count} of {config.values} values",
        **({} if model.names is None else {"classes": len(model.names)}),
        **found,
    }
