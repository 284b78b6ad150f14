"""Recorded numbers of tests/golden (PARITY.md explains each case)."""

import json
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@cache
def meta() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@cache
def _tensors() -> dict[str, Tensor]:
    return load_file(str(GOLDEN / "golden.safetensors"))


def case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors without the case's prefix) of one case."""
    prefix = name + "/"
    found = {k.removeprefix(prefix): v for k, v in _tensors().items() if k.startswith(prefix)}
    assert found, f"no recorded tensors for {name}"
    return meta()["cases"][name]["meta"], found
