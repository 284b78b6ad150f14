"""The published files of GRN → a model of ours."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
_CHUNK = re.compile(r"block_chunks\.([0-9]{1,4})\.module\.([0-9]{1,4})\.")


def flat_blocks(state: Mapping[str, T], chunk: int = 0) -> dict[str, T]:
    """The tensors of a published text model, whose blocks come in chunks (0: as large as the names show), with one number per
    block."""
    chunk = chunk or 1 + max((int(found[2]) for name in state if (found := _CHUNK.match(name))), default=0)
    return {
        _CHUNK.sub(lambda found: f"blocks.{int(found[1]) * chunk + int(found[2])}.", name): tensor
        for name, tensor in state.items()
    }
