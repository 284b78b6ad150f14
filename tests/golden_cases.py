"""Recorded numbers of tests/golden and its folders (their PARITY.md explain each case)."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@cache
def meta(folder: str = "") -> dict:
    return json.loads((GOLDEN / folder / "golden.json").read_text())


@cache
def _tensors(folder: str) -> dict[str, Tensor]:
    return load_file(str(GOLDEN / folder / "golden.safetensors"))


def case(name: str, folder: str = "") -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors without the case's prefix) of one case."""
    prefix = name + "/"
    found = {k.removeprefix(prefix): v for k, v in _tensors(folder).items() if k.startswith(prefix)}
    return meta(folder)["cases"][name].get("meta") or {}, found


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
