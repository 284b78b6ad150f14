"""Two model folders: names, shapes and values of every tensor, configs, and what their text tokenizers make of words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitdance.folder.parts import HEAD_CONFIG, LM_CONFIG, TOKENIZER_CONFIG
from bitdance.folder.stored import PIECE
from bitdance.foreign import load_text_tokenizer
from bitdance.verify.examine import TensorLocation, places_of
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.text import listed

Places = Mapping[tuple[str, str], TensorLocation]
TEXTS = (
    "a red fox in the snow, 35 mm photograph",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich",
    "日本の山 · горы · جبال · 🦊👩‍🚀",
    "tabs\tand\nlines   and   spaces 1234567890 'll don't",
    "<|im_start|>user <|vision_start|> <|res_4|>",
    "",
)


def compare(first: Path, second: Path) -> dict[str, Any]:
    """What `--against` says. Both folders have been through `check_folder`.

    "tensors": one row for each that both have: part, name, shapes, dtypes, "equal" (bit for bit), "max" and "mean" absolute
    difference (None where shapes differ or a number is not finite). "problems": what cannot come from another dtype or other
    training of the same model: names of one folder only, shapes, text.
    """
    texts = _texts(first, second)
    found = compared(first, second, places_of(first), places_of(second), (LM_CONFIG, TOKENIZER_CONFIG, HEAD_CONFIG))
    if texts:
        found["problems"].append(f"the text tokenizers give other tokens for {listed([repr(text) for text in texts], ', ')}")
    return {**found, "texts_that_differ": texts}


def compared(first: Path, second: Path, ours: Places, theirs: Places, configs: Sequence[str]) -> dict[str, Any]:
    """What `compare` says of tensors and configs, for folders of any kind; (part, name) → where a tensor lies in each."""
    rows = [_row(ours[key], theirs[key]) for key in ours if key in theirs]
    only = [sorted(" ".join(key) for key in one.keys() - other.keys()) for one, other in ((ours, theirs), (theirs, ours))]
    problems = [
        f"{len(names)} tensors are in {which} only: {listed(names, ', ')}"
        for which, names in zip(("the model", "the other"), only, strict=True)
        if names
    ]
    shapes = [f"{r['part']} {r['name']} {r['shape']} and {r['other_shape']}" for r in rows if r["shape"] != r["other_shape"]]
    if shapes:
        problems.append(f"{len(shapes)} tensors have another shape: {listed(shapes, ', ')}")
    return {
        "against": second.name,
        "problems": problems,
        "only_in_model": only[0],
        "only_in_other": only[1],
        "equal": sum(row["equal"] for row in rows),
        "tensors": rows,
        "configs": _configs(first, second, configs),
    }


def difference(one: Tensor, other: Tensor) -> tuple[float | None, float | None]:
    """(greatest, mean) absolute difference of two tensors of one shape, a piece at a time; None where it is not finite."""
    greatest, total = 0.0, 0.0
    for a, b in zip(one.reshape(-1).split(PIECE), other.reshape(-1).split(PIECE), strict=True):
        apart = (a.double() - b.double()).abs() if a.numel() else a.new_zeros(1)
        greatest, total = max(greatest, float(apart.max())), total + float(apart.sum())
        if not torch.isfinite(apart).all():
            return None, None
    return greatest, total / max(one.numel(), 1)


def _row(ours: TensorLocation, theirs: TensorLocation) -> dict[str, Any]:
    with safe_open(str(ours.file), framework="pt") as one, safe_open(str(theirs.file), framework="pt") as other:
        a, b = one.get_tensor(ours.name), other.get_tensor(theirs.name)
    same = a.shape == b.shape
    greatest, mean = difference(a, b) if same else (None, None)
    return {
        "part": ours.part,
        "name": ours.name,
        "shape": list(a.shape),
        "other_shape": list(b.shape),
        "dtype": str(a.dtype).removeprefix("torch."),
        "other_dtype": str(b.dtype).removeprefix("torch."),
        "equal": same and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)),
        "max": greatest,
        "mean": mean,
    }


def _bytes(tensor: Tensor) -> Tensor:
    """What is stored: a NaN equals itself, and 0 is not -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _configs(first: Path, second: Path, files: Sequence[str]) -> dict[str, list[Any]]:
    """file and dotted key → the two values, where they differ; None where one config does not say."""
    differ: dict[str, list[Any]] = {}
    for file in files:
        one, other = (_flat(read_json(folder / file)) for folder in (first, second))
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                differ[f"{file} {key}"] = [one.get(key), other.get(key)]
    return differ


def _flat(value: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {before: value}
    inner = [_flat(content, f"{before}.{name}" if before else name) for name, content in value.items()]
    return {key: content for part in inner for key, content in part.items()}


def _texts(first: Path, second: Path) -> list[str]:
    """The texts, of a few, of which the two text tokenizers make different tokens; user text and special tokens alike."""
    one, other = map(load_text_tokenizer, (first, second))
    return [text for text in TEXTS if one(text)["input_ids"] != other(text)["input_ids"]]
