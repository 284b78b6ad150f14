"""The published files of GRN → a model of ours. No code of theirs runs, nothing is un-pickled blindly.

    {"model", "model_ema1", "model_ema2", "optimizer", "epoch", "args"}   a class model; it samples with `model_ema1`
    name → tensor, or {"trainer": {"gpt_fsdp": …}}                        a text model
    {"ema"} or {"vae"}                                                    a picture tokenizer

The tokenizer lies in a file of its own, and of a text model so does the text encoder.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bitdance.folder.picture_model import PictureModel
from bitdance.folder.published import (
    check_said,
    count_of,
    filled,
    flat_blocks,
    need_tokenizer,
    plain_tensors,
    put_together,
    said_in,
    shape_of,
)
from bitdance.kinds.refine.config import (
    FORMS,
    ClassRefineConfig,
    RefineConfig,
    TextRefineConfig,
    published_name,
)
from bitdance.kinds.refine.model import build_network
from bitdance.kinds.refine.settings import NAMES, PRESETS, RefineSettings
from bitdance.values import shown
from lfq_tokenizer.any_tokenizer import load_tokenizer
from lfq_tokenizer.hbq_file import ROUNDS, read_hbq
from lfq_tokenizer.pt_file import read_content
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import read_safetensors

PARTS = ("tokenizer", "text_encoder", "classes", "config")
STATE_DICTS = ("model_ema1", "model")


def read_published(path: Path, parts: Mapping[str, Path]) -> tuple[PictureModel, dict[str, Any]]:
    """The model of a published file, and what it says of where its parts came from.

    `parts`: "tokenizer", a published `.ckpt` or a folder; "text_encoder", a folder as transformers keeps it; "classes", a
    classes.json; "config", a JSON object of fields that the weights do not say (labels, rounds, attention, grids, and those of
    training). FileNotFoundError, or ValueError that names the file, for one that is broken, would run code, or is no such model.
    """
    source, said = need_tokenizer(path, parts), said_in(parts)
    name, state = _content(path)
    text = any(key.startswith("block_chunks.") for key in state)
    state = flat_blocks(state) if text else {key.removeprefix("net."): tensor for key, tensor in state.items()}
    tokenizer = load_tokenizer(source) if source.is_dir() else read_hbq(source, said.get("rounds", ROUNDS))
    config = (text_config if text else class_config)(state, said, tokenizer.config.bits, path)
    network = filled(partial(build_network, config), state, path)
    return put_together(path, name, network, tokenizer, _extras(config), parts)


def class_config(state: Mapping[str, Tensor], said: Mapping[str, Any], bits: int, path: Path) -> ClassRefineConfig:
    """The shape that the weights of a class model have, and what they do not show from `said` or as published."""
    width, tokens = shape_of(state, "pos_embed", path)[2], shape_of(state, "pos_embed", path)[1]
    bottleneck, channels = shape_of(state, "x_embedder.proj1.weight", path)[:2]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{path}: a table of {tokens} positions is no square grid")
    in_context = shape_of(state, "in_context_posemb", path)[1]
    shown_by_weights = {
        "width": width,
        "depth": count_of(state, "blocks.{}.norm1.weight"),
        "bits": bits,
        "bottleneck": bottleneck,
        "in_context_len": in_context,
        "num_classes": shape_of(state, "y_embedder.embedding_table.weight", path)[0] - 1,
        "grid": math.isqrt(tokens),
        "heads": width // shape_of(state, "blocks.0.attn.q_norm.weight", path)[0],
    }
    start = {"in_context_start": {768: 4, 1024: 8}.get(width, 10)}
    return _config(ClassRefineConfig, shown_by_weights, {**start, **said}, channels, path)


def text_config(state: Mapping[str, Tensor], said: Mapping[str, Any], bits: int, path: Path) -> TextRefineConfig:
    """The same of a text model."""
    width, channels = shape_of(state, "word_embed.weight", path)
    inner = shape_of(state, "blocks.0.mlp.gate_proj.weight", path)[0]
    shown_by_weights = {
        "width": width,
        "depth": count_of(state, "blocks.{}.input_layernorm.weight"),
        "bits": bits,
        "text_width": shape_of(state, "text_proj.weight", path)[1],
        "heads": width // shape_of(state, "blocks.0.attn.q_norm.weight", path)[0],
        "mlp_ratio": inner / width,
    }
    published = {"attention": "joint" if "FSA" in path.name else "prefix", "P_mean": -1.3, "P_std": 1.3}
    return _config(TextRefineConfig, shown_by_weights, {**published, **said}, channels, path)


def _config(kind: type[Any], by_weights: dict[str, Any], said: Mapping[str, Any], channels: int, path: Path) -> Any:
    """The config whose one-hot labels have so many channels: that tells the form of the labels."""
    fields = kind.__dataclass_fields__
    for name in said:
        if name not in fields:
            raise ValueError(f"{path}: {name} is not of a {kind.condition}-conditional network")
    check_said(said, by_weights, path)
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
            return key, plain_tensors(content[key], path)
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping) and isinstance(trainer.get("gpt_fsdp"), Mapping):
        return "trainer.gpt_fsdp", plain_tensors(trainer["gpt_fsdp"], path)
    if not any(str(key).startswith(("block_chunks.", "net.")) for key in content):
        keys = listed([shown(key) for key in content], ", ")
        raise ValueError(f"{path} holds {keys}; expected the weights of a refinement model under {' or '.join(STATE_DICTS)}")
    return name, plain_tensors(content, path)


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
