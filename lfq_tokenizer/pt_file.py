"""A tokenizer out of a `.pt` file of the class-conditional release, without running anything that the file says.

    tokenizer, report = read_pt("tokenizer.pt")
    tokenizer.save_pretrained(folder)

Two layouts are known (published checkpoints):

    tokenizer   {"state_dict": {encoder.*, decoder.*, and further keys, such as losses}}
    generator   {"model", "optimizer", "epochs", "args", ["ema"]}, whose state dicts hold the tokenizer as vae.*

The file is a pickle, which `pickles.py` looks through first: tensors, plain containers and argparse.Namespace (`args`, which is
data and not used) are built; anything else is refused before it is built, and so is what would grow beyond the file.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfq_tokenizer.config import TokenizerConfig
from lfq_tokenizer.pickles import Refused, read_torch
from lfq_tokenizer.text import SHOWN, printable
from lfq_tokenizer.tokenizer import LFQTokenizer
from lfq_tokenizer.weights import check_shapes

STATE_DICTS = ("ema", "model", "state_dict")  # the averaged weights come first, as in the published sampling script
PREFIXES = ("", "vae.")
PARTS = ("encoder.", "decoder.")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class PtReport:
    """Where the tokenizer was found: `state_dict` ("" for the file itself) and `prefix`. `ignored` counts the other keys of that
    state dict by the first part of their names; `unread` are the file's other entries."""

    state_dict: str
    prefix: str
    ignored: dict[str, int]
    unread: tuple[str, ...]


def read_pt(path: Path | str) -> tuple[LFQTokenizer, PtReport]:
    """The tokenizer of a `.pt` file, on the CPU, in the file's dtype, in eval mode; its config follows from the shapes.

    FileNotFoundError; ValueError when the file is broken, would have to run code, or does not hold exactly the tensors of one
    tokenizer. Where torch wrote it as a zip file (since 2020), only the tensors that are taken are read from disk.
    """
    content = _load(Path(path))
    name, prefix, state = _tokenizer_tensors(content, path)
    taken = {key[len(prefix) :]: value for key, value in state.items() if _part(key, prefix)}
    for key, value in taken.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in DTYPES:
            kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {prefix}{key} is a {kind}; expected a plain tensor of floating point numbers")
    shapes = {key: tuple(value.shape) for key, value in taken.items()}
    try:
        config = TokenizerConfig.from_shapes(shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        tokenizer = LFQTokenizer(config)
    check_shapes({key: tuple(t.shape) for key, t in tokenizer.state_dict().items()}, shapes, path)
    tokenizer.load_state_dict({key: value.detach() for key, value in taken.items()}, strict=True, assign=True)
    others = Counter(str(key).split(".")[0] for key in state if not _part(key, prefix))
    unread = tuple(str(key) for key in content if key != name) if name else ()
    return tokenizer.eval(), PtReport(name, prefix, dict(sorted(others.items())), unread)


def _load(path: Path) -> Mapping[Any, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the .pt file of a tokenizer or of a class-conditional generator")
    try:
        content = read_torch(path, argparse.Namespace, mmap=True)
    except Refused as error:
        raise ValueError(
            f"{path} asks for {error.named}, which could run code; refused, and nothing was run. Only tensors, plain containers "
            "and argparse.Namespace are read. If you trust whoever made the file, ask for safetensors."
        ) from None
    except Exception as error:  # a broken pickle may raise anything
        # of torch's own text only the first line: it goes on to advise to switch the protection off
        reason = printable(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is no readable .pt file ({reason}); nothing in it was run. Download it again."
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dictionary with one of {', '.join(STATE_DICTS)}")
    return content


def _part(key: Any, prefix: str) -> bool:
    return isinstance(key, str) and key.startswith(tuple(prefix + part for part in PARTS))


def _tokenizer_tensors(content: Mapping[Any, Any], path: Path | str) -> tuple[str, str, Mapping[Any, Any]]:
    """(name of the state dict, prefix of the tokenizer in it, the state dict), the first in the order of STATE_DICTS."""
    places = [(name, content[name]) for name in STATE_DICTS if isinstance(content.get(name), Mapping)]
    for name, state in [*places, ("", content)]:
        found = [prefix for prefix in PREFIXES if any(_part(key, prefix) for key in state)]
        if len(found) > 1:
            raise ValueError(f"{path}: {name or 'the file'} holds a tokenizer as encoder.* and another as vae.encoder.*")
        if found:
            return name, found[0], state
    state = places[0][1] if places else content
    shown = sorted({printable(str(key).split(".")[0][:100]) for key in state})
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    raise ValueError(
        f"{path} holds no tokenizer: no encoder.* or vae.encoder.* among {', '.join(shown[:SHOWN]) or 'no keys'}{more}. "
        "Give a tokenizer's .pt, or a generator's with its vae.* half."
    )
