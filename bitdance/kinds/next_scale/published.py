"""The published files of VAR and Infinity → a model of ours."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
_CHUNK = re.compile(r"block_chunks\.([0-9]{1,4})\.module\.([0-9]{1,4})\.")
_NAMES = (
    (".sa.", ".attn."),
    (".ca.", ".cross."),
    ("scale_mul_1H11", "scale_mul"),
    ("text_proj_for_sos.cross.", "text_pool."),
    ("text_proj_for_ca.", "text_proj."),
)
BUFFERS = ("lvl_1L", "attn_bias_for_masking")


def renamed(state: Mapping[str, T], chunk: int = 0) -> dict[str, T]:
    """The tensors of a published transformer under our names. Buffers that follow from the shape are left out; blocks that
    come in chunks (0: as large as the names show) get one number each."""
    chunk = chunk or 1 + max((int(match[2]) for name in state if (match := _CHUNK.match(name))), default=0)
    found: dict[str, T] = {}
    for name, tensor in state.items():
        if name in BUFFERS or name.endswith("zero_k_bias"):
            continue
        name = _CHUNK.sub(lambda match: f"blocks.{int(match[1]) * chunk + int(match[2])}.", name)
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found
