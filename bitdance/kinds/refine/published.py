"""The published files of GRN → a model of ours. No code of theirs runs, nothing is un-pickled blindly.

    {"model", "model_ema1", "model_ema2", "optimizer", "epoch", "args"}   a class model; it samples with `model_ema1`
    name → tensor, or {"trainer": {"gpt_fsdp": …}}                        a text model
    {"ema"} or {"vae"}                                                    a picture tokenizer

The tokenizer lies in a file of its own, and of a text model so does the text encoder.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.refine.config import (
    FORMS,
    ClassRefineConfig,
    RefineConfig,
    TextRefineConfig,
    published_name,
)
from bitdance.kinds.refine.model import build_network
from bitdance.kinds.refine.settings import NAMES, PRESETS, RefineSettings
from bitdance.networks.text_encoder import TextEncoder
from bitdance.sequence.classes import names_for
from bitdance.values import shown
from lfq_tokenizer.any_tokenizer import load_tokenizer
from lfq_tokenizer.hbq_file import ROUNDS, read_hbq
from lfq_tokenizer.json_file import read_config
from lfq_tokenizer.pt_file import DTYPES, read_content
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import check_shapes, read_safetensors

PARTS = ("tokenizer", "text_encoder", "classes", "config")
STATE_DICTS = ("model_ema1", "model")
_CHUNK = re.compile(r"block_chunks\.([0-9]{1,4})\.module\.([0-9]{1,4})\.")
T = TypeVar("T")


def flat_blocks(state: Mapping[str, T], chunk: int = 0) -> dict[str, T]:
    """The tensors of a published text model, whose blocks come in chunks (0: as large as the names show), with one number per
    block."""
    chunk = chunk or 1 + max((int(found[2]) for name in state if (found := _CHUNK.match(name))), default=0)
    return {
        _CHUNK.sub(lambda found: f"blocks.{int(found[1]) * chunk + int(found[2])}.", name): tensor
        for name, tensor in state.items()
    }


def read_published(path: Path, parts: Mapping[str, Path]) -> tuple[PictureModel, dict[str, Any]]:
    """The model of a published file, and what it says of where its parts came from.

    `parts`: "tokenizer", a published `.ckpt` or a folder; "text_encoder", a folder as transformers keeps it; "classes", a
    classes.json; "config", a JSON object of fields that the weights do not say (labels, rounds, attention, grids, and those of
    training). FileNotFoundError, or ValueError that names the file, for one that is broken, would run code, or is no such model.
    """
    if "tokenizer" not in parts:
        raise ValueError(f"{path} holds no picture tokenizer; give its file with --part tokenizer=FILE")
    said = read_config(parts["config"], _checked) if "config" in parts else {}
    name, state = _content(path)
    text = any(key.startswith("block_chunks.") for key in state)
    state = flat_blocks(state) if text else {key.removeprefix("net."): tensor for key, tensor in state.items()}
    source = parts["tokenizer"]
    tokenizer = load_tokenizer(source) if source.is_dir() else read_hbq(source, said.get("rounds", ROUNDS))
    config = (text_config if text else class_config)(state, said, tokenizer.config.bits, path)
    with torch.device("meta"):
        network = build_network(config)
    check_shapes(_shapes(network.state_dict()), _shapes(state), path)
    network.load_state_dict({key: tensor.detach() for key, tensor in state.items()}, strict=True, assign=True)
    for module, file in ((network, path), (tokenizer, source)):
        if odd := [key for key, tensor in module.state_dict().items() if not bool(torch.isfinite(tensor).all())]:
            raise ValueError(f"{file}: {listed(odd, ', ')} hold NaN or infinity; download it again")
    extras, encoder, names = _extras(config), None, None
    found = {"weights from": name, "tokenizer from": str(source)}
    if isinstance(config, TextRefineConfig):
        if "text_encoder" not in parts:
            raise ValueError(f"{path} reads the features of a text encoder; give its folder with --part text_encoder=DIR")
        encoder = TextEncoder.from_pretrained(parts["text_encoder"], prefix=extras.get("prompt_prefix", ""), weights=False)
        if encoder.width != config.text_width:
            raise ValueError(
                f"{parts['text_encoder']} gives {encoder.width} features per token, the model reads {config.text_width}; give "
                "the encoder that it was trained with"
            )
        found["text encoder from"] = str(parts["text_encoder"])
    else:
        assert isinstance(config, ClassRefineConfig)
        names, found["names from"] = names_for(config.num_classes, parts.get("classes"))
    return PictureModel(network.eval(), tokenizer.eval(), names, extras, encoder), found


def class_config(state: Mapping[str, Tensor], said: Mapping[str, Any], bits: int, path: Path) -> ClassRefineConfig:
    """The shape that the weights of a class model have, and what they do not show from `said` or as published."""
    width, tokens = _shape(state, "pos_embed", path)[2], _shape(state, "pos_embed", path)[1]
    bottleneck, channels = _shape(state, "x_embedder.proj1.weight", path)[:2]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{path}: a table of {tokens} positions is no square grid")
    in_context = _shape(state, "in_context_posemb", path)[1]
    shown_by_weights = {
        "width": width,
        "depth": _count(state, "blocks.{}.norm1.weight"),
        "bits": bits,
        "bottleneck": bottleneck,
        "in_context_len": in_context,
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", path)[0] - 1,
        "grid": math.isqrt(tokens),
        "heads": width // _shape(state, "blocks.0.attn.q_norm.weight", path)[0],
    }
    start = {"in_context_start": {768: 4, 1024: 8}.get(width, 10)}
    return _config(ClassRefineConfig, shown_by_weights, {**start, **said}, channels, path)


def text_config(state: Mapping[str, Tensor], said: Mapping[str, Any], bits: int, path: Path) -> TextRefineConfig:
    """The same of a text model."""
    width, channels = _shape(state, "word_embed.weight", path)
    inner = _shape(state, "blocks.0.mlp.gate_proj.weight", path)[0]
    shown_by_weights = {
        "width": width,
        "depth": _count(state, "blocks.{}.input_layernorm.weight"),
        "bits": bits,
        "text_width": _shape(state, "text_proj.weight", path)[1],
        "heads": width // _shape(state, "blocks.0.attn.q_norm.weight", path)[0],
        "mlp_ratio": inner / width,
    }
    published = {"attention": "joint" if "FSA" in path.name else "prefix", "P_mean": -1.3, "P_std": 1.3}
    return _config(TextRefineConfig, shown_by_weights, {**published, **said}, channels, path)


def _config(kind: type[Any], by_weights: dict[str, Any], said: Mapping[str, Any], channels: int, path: Path) -> Any:
    """The config whose one-hot labels have so many channels: that tells the form of the labels."""
    fields = kind.__dataclass_fields__
    for name, value in said.items():
        if name not in fields:
            raise ValueError(f"{path}: {name} is not of a {kind.condition}-conditional network")
        if name in by_weights and by_weights[name] != value:
            raise ValueError(f"{path}: {name} = {by_weights[name]} by its weights, {shown(value)} by its config; must be equal")
    found = []
    for form in [said["labels"]] if "labels" in said else FORMS:
        try:
            config = kind(**{"rounds": ROUNDS, **said, "labels": form, **by_weights})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if config.label_count * config.values == channels:
            found.append(config)
    if not found:
        bits = by_weights["bits"]
        raise ValueError(f"{path}: labels of {channels} channels do not fit a tokenizer of {bits} bits per token; give its own")
    return found[0]


def _content(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(where the weights lie in the file, the weights)."""
    if path.suffix == ".safetensors":
        return "the file itself", read_safetensors(path)
    content: Any = read_content(path)
    name = "the file itself"
    for key in STATE_DICTS:
        if isinstance(content.get(key), Mapping):
            return key, _plain(content[key], path)
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping) and isinstance(trainer.get("gpt_fsdp"), Mapping):
        return "trainer.gpt_fsdp", _plain(trainer["gpt_fsdp"], path)
    if not any(str(key).startswith(("block_chunks.", "net.")) for key in content):
        keys = listed([shown(key) for key in content], ", ")
        raise ValueError(f"{path} holds {keys}; expected the weights of a refinement model under {' or '.join(STATE_DICTS)}")
    return name, _plain(content, path)


def _plain(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    for key, value in state.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in DTYPES
        if not isinstance(key, str) or not plain:
            kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {shown(key)} is a {kind}; expected a plain tensor of floating point numbers")
    return dict(state)


def _extras(config: RefineConfig) -> dict[str, Any]:
    """Settings that published figures were made with, where the model is known; otherwise those of its family."""
    name = published_name(config)
    if isinstance(config, TextRefineConfig):
        joint = config.attention == "joint"
        preset = "GRN-T2I-joint" if joint else "GRN-T2I"
        extras: dict[str, Any] = {"prompt_prefix": "<T2I>"} if joint else {}
    else:
        preset, extras = "GRN-L" if name == "GRN-L" else "GRN-B", {}
    settings = PRESETS[preset]
    assert settings is not None
    plain = RefineSettings()
    own = {key: getattr(settings, key) for key in NAMES if getattr(settings, key) != getattr(plain, key)}
    adaptive = {"adaptive": vars(PRESETS["GRN-B-adaptive"].adaptive)} if name == "GRN-B" else {}  # type: ignore[union-attr]
    extras["defaults"] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, **own, **adaptive}
    return extras | ({"card": {"name": name}} if name else {})


def _checked(data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"a {type(data).__name__}; expected an object")
    return dict(data)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _shape(state: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"{path} has no tensor {name}; it is no refinement model of this family")
    return tuple(state[name].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number
