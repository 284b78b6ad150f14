"""Published files → a model with one network: what the kinds share that convert them. No code of theirs runs.

A kind reads a file's content, tells its config from the shapes of the weights, and hands both to `filled` and `put_together`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitdance.folder.picture_model import PictureModel
from bitdance.networks.text_encoder import TextEncoder
from bitdance.sequence.classes import names_for
from bitdance.values import shown
from lfq_tokenizer.json_file import read_config
from lfq_tokenizer.pt_file import DTYPES
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import check_shapes

T = TypeVar("T")
_CHUNK = re.compile(r"block_chunks\.([0-9]{1,4})\.module\.([0-9]{1,4})\.")


def flat_blocks(state: Mapping[str, T], chunk: int = 0) -> dict[str, T]:
    """The tensors of a text model of GRN or Infinity, whose blocks come in chunks (0: as large as the names show), with one
    number per block."""
    chunk = chunk or 1 + max((int(found[2]) for name in state if (found := _CHUNK.match(name))), default=0)
    return {
        _CHUNK.sub(lambda found: f"blocks.{int(found[1]) * chunk + int(found[2])}.", name): tensor
        for name, tensor in state.items()
    }


def plain_tensors(state: Mapping[Any, Any], path: Path, whole: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights of a file; those named in `whole` may be whole numbers. ValueError for what is no plain tensor."""
    for key, value in state.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and (value.dtype in DTYPES or key in whole)
        if not isinstance(key, str) or not plain:
            kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {shown(key)} is a {kind}; expected a plain tensor of floating point numbers")
    return dict(state)


def shape_of(state: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, ...]:
    """The shape of a tensor that tells the network's. ValueError where it is missing."""
    if name not in state:
        raise ValueError(f"{path} has no tensor {name}; it is no model of this family")
    return tuple(state[name].shape)


def count_of(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are: `pattern` with 0, 1, … is a tensor of each."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def said_in(parts: Mapping[str, Path]) -> dict[str, Any]:
    """The JSON object of `--part config=FILE`, empty where there is none."""
    return read_config(parts["config"], _object) if "config" in parts else {}


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"a {type(data).__name__}; expected an object")
    return dict(data)


def check_said(said: Mapping[str, Any], by_weights: Mapping[str, Any], path: Path) -> None:
    """ValueError where a config contradicts the weights."""
    for name, value in said.items():
        if name in by_weights and by_weights[name] != value:
            raise ValueError(f"{path}: {name} = {by_weights[name]} by its weights, {shown(value)} by its config; must be equal")


def filled(build: Callable[[], nn.Module], state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A network with these weights, in eval mode. ValueError where they are not exactly its own."""
    with torch.device("meta"):
        network = build()
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    check_shapes(expected, {key: tuple(tensor.shape) for key, tensor in state.items()}, path)
    network.load_state_dict({key: tensor.detach() for key, tensor in state.items()}, strict=True, assign=True)
    return network.eval()


def check_finite(module: nn.Module, source: Path | str) -> None:
    """ValueError for weights that hold NaN or infinity."""
    if odd := [key for key, tensor in module.state_dict().items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"{source}: {listed(odd, ', ')} hold NaN or infinity; download it again")


def put_together(
    path: Path, weights_from: str, network: Any, tokenizer: nn.Module, extras: dict[str, Any], parts: Mapping[str, Path]
) -> tuple[PictureModel, dict[str, Any]]:
    """The parts of a model → the model, and where each came from: with the text encoder of `parts`, or the names of classes.
    ValueError for numbers that are not finite, and for a text encoder that is missing or of another width."""
    config, source = network.config, parts["tokenizer"]
    check_finite(network, path)
    check_finite(tokenizer, source)
    found = {"weights from": weights_from, "tokenizer from": str(source)}
    if config.text_width is None:
        names, found["names from"] = names_for(config.class_count, parts.get("classes"))
        return PictureModel(network, tokenizer.eval(), names, extras), found
    if "text_encoder" not in parts:
        raise ValueError(f"{path} reads the features of a text encoder; give its folder with --part text_encoder=DIR")
    folder = parts["text_encoder"]
    encoder = TextEncoder.from_pretrained(folder, prefix=extras.get("prompt_prefix", ""), weights=False)
    if encoder.width != config.text_width:
        raise ValueError(
            f"{folder} gives {encoder.width} features per token, the model reads {config.text_width}; give the encoder that it "
            "was trained with"
        )
    return PictureModel(network, tokenizer.eval(), None, extras, encoder), {**found, "text encoder from": str(folder)}


def need_tokenizer(path: Path, parts: Mapping[str, Path]) -> Path:
    """The picture tokenizer of `parts`. ValueError where there is none."""
    if "tokenizer" not in parts:
        raise ValueError(f"{path} holds no picture tokenizer; give its file with --part tokenizer=FILE")
    return parts["tokenizer"]
