"""An HBQ tokenizer out of the published `.ckpt` (or a `.safetensors` with its names); nothing that the file says is run.

The file says neither the rounds of its quantiser nor how many latents become bits; all published ones have four rounds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfq_tokenizer.hbq_vae import HBQConfig, HBQTokenizer, picture_part
from lfq_tokenizer.pt_file import DTYPES, read_content
from lfq_tokenizer.weights import check_shapes, read_safetensors

ROUNDS = 4
STATE_DICTS = ("ema", "vae")  # the averaged weights come first, as in the published code


def is_hbq(content: Mapping[Any, Any]) -> bool:
    """Whether the content of a file is such a tokenizer."""
    return "conv2.weight" in _state(content)


def read_hbq(path: Path, rounds: int = ROUNDS) -> HBQTokenizer:
    """The tokenizer, on the CPU, in the file's dtype, in eval mode; its widths follow from the shapes. FileNotFoundError;
    ValueError when the file is broken, would have to run code, or does not hold exactly the tensors of one tokenizer."""
    state = _state(read_safetensors(path) if path.suffix == ".safetensors" else read_content(path))
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in DTYPES:
            raise ValueError(f"{path}: {key!r:.60} is no plain tensor of floating point numbers")
    found = picture_part(state)
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    try:
        config = HBQConfig.from_shapes(shapes, rounds)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with torch.device("meta"):
        tokenizer = HBQTokenizer(config)
    check_shapes({key: tuple(t.shape) for key, t in tokenizer.state_dict().items()}, shapes, path)
    tokenizer.load_state_dict({key: tensor.clone() for key, tensor in found.items()}, strict=True, assign=True)
    return tokenizer.eval()


def _state(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return next((content[name] for name in STATE_DICTS if isinstance(content.get(name), Mapping)), content)
