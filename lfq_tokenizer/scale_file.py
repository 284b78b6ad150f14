"""The published tokenizers of VAR and Infinity out of their `.pth` files, without running anything that the files say.

VAR        name → tensor; `quantize.ema_vocab_hit_SV` (statistics) is not read
Infinity   {"vae": …}; every layer is wrapped once more (`conv_in.conv.weight`), `quantizer.*` and `quantize.*` are masks
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfq_tokenizer.pt_file import DTYPES, read_content
from lfq_tokenizer.scale_vae import ScaleConfig, ScaleTokenizer
from lfq_tokenizer.weights import check_shapes, read_safetensors

_WRAPPED = re.compile(
    r"(conv_in|conv_out|conv1|conv2|nin_shortcut|norm1|norm2|norm_out|downsample\.conv|upsample\.conv)\.(?:conv|norm)\."
)
_SMOOTH = re.compile(r"quantize\.quant_resi\.(?:qresi_ls\.([0-9]+)|([0-9]+)|qresi)\.")


def is_scales(content: Mapping[Any, Any]) -> bool:
    """Whether the content of a file is such a tokenizer."""
    state = _state(content)
    return "quantize.embedding.weight" in state or "encoder.conv_in.conv.weight" in state


def read_scales(path: Path, scales: int = 10) -> ScaleTokenizer:
    """The tokenizer, on the CPU, in the file's dtype, in eval mode; its widths follow from the shapes. `scales` is what a file
    does not say, and so is whether a token is several positions (`ScaleTokenizer.patchified`). FileNotFoundError; ValueError when
    the file is broken, would have to run code, or does not hold exactly the tensors of one tokenizer."""
    state = _state(read_safetensors(path) if path.suffix == ".safetensors" else read_content(path))
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{path}: {key!r:.60} is no plain tensor")
    found = renamed(state)
    if odd := [key for key, value in found.items() if value.dtype not in DTYPES]:
        raise ValueError(f"{path}: {odd[0]} is a {found[odd[0]].dtype}; expected floating point numbers")
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    try:
        config = config_of(shapes, scales)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with torch.device("meta"):
        tokenizer = ScaleTokenizer(config)
    check_shapes({key: tuple(t.shape) for key, t in tokenizer.state_dict().items()}, shapes, path)
    tokenizer.load_state_dict({key: tensor.detach() for key, tensor in found.items()}, strict=True, assign=True)
    return tokenizer.eval()


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(("quantizer.", "quantize.lfq.")) or name.endswith("ema_vocab_hit_SV"):
            continue
        name = _WRAPPED.sub(lambda match: f"{match[1]}.", name)
        name = _SMOOTH.sub(lambda match: f"quantize.smooth.{match[1] or match[2] or 0}.", name)
        found[name] = tensor
    return found


def config_of(shapes: Mapping[str, tuple[int, ...]], scales: int) -> ScaleConfig:
    """The shape that tensors under our names have. ValueError names one that is missing."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"no tensor {name}; this is no tokenizer of a next-scale model")
        return shapes[name]

    def count(pattern: str) -> int:
        number = 0
        while pattern.format(number) in shapes:
            number += 1
        return number

    ch, levels = shape("encoder.conv_in.weight")[0], count("encoder.down.{}.block.0.conv1.weight")
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    codes = shapes.get("quantize.embedding.weight", (0, 0))[0]
    smooth = count("quantize.smooth.{}.weight")
    return ScaleConfig(
        "codes" if codes else "bits",
        shape("encoder.conv_out.weight")[0],
        ch,
        tuple(width // ch for width in widths),
        count("encoder.down.0.block.{}.conv1.weight"),
        codes,
        0 if codes and smooth == scales else smooth if codes else 4,
        0.5 if smooth or not codes else 0.0,
        scales,
    )


def _state(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    vae = content.get("vae")
    return vae if isinstance(vae, Mapping) else content
