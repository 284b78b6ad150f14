"""16 hex digits that tell models apart: of the weights and of what else decides pictures, however a folder stores them.

Training checkpoint, published layout, diffusers layout, one file or many: equal tensors give an equal fingerprint. Cards,
defaults, conversion.json and settings of training do not count.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from bitdance.folder.parts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BACKBONE,
    DIFFUSERS,
    HEAD_CONFIG,
    LM_CONFIG,
    STEMS,
    TOKENIZER_CONFIG,
)
from bitdance.folder.stored import LazyTensor, stored_tensors
from bitdance.foreign import lm_fields
from bitdance.heads.diffusion.network import HeadConfig
from lfq_tokenizer import TokenizerConfig
from lfq_tokenizer.json_file import read_config, read_json

ADAPTER = ADAPTER_WEIGHTS.removesuffix(".safetensors")
_WHOLE = 1 << 20  # numbers of a tensor up to which all are read
_SAMPLES, _SAMPLE = 16, 1 << 14  # of a larger one: pieces, numbers in each; first and last included
# of config.json: what has no part in a picture, or shows in the weights' shapes
_NO_PART = (
    *("use_cache", "initializer_range", "attention_dropout", "embd_pdrop", "resid_pdrop", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "tie_word_embeddings", "vocab_size", "max_window_layers", "use_sliding_window", "layer_types"),
    *("max_position_embeddings", "output_router_logits", "router_aux_loss_coef", "rope_parameters", "rope_scaling", "rope_theta"),
)
_HEAD = ("ch_target", "ch_cond", "ch_latent", "depth_latent", "depth_adanln", "parallel_num", "use_swiglu", "time_shift")
_TOKENIZER = ("normalizer", "pre_tokenizer", "model", "added_tokens")


def fingerprint(folder: Path) -> str:
    """The fingerprint of a model folder in the published layout, of one with a tokenizer alone, or of an adapter's.

    Large tensors count by 16 evenly spaced pieces, so that 30 GB take a moment."""
    stems = {DIFFUSERS[part]: stem for part, stem in STEMS.items()} | {ADAPTER: ADAPTER}
    parts = {part: stored_tensors(folder, stem) for part, stem in stems.items() if any(folder.glob(f"{stem}.safetensors*"))}
    parts.get(DIFFUSERS[BACKBONE], {}).pop("lm_head.weight", None)
    return fingerprint_of(parts, dict(_configs(folder)))


def fingerprint_of(parts: Mapping[str, Mapping[str, LazyTensor]], configs: Mapping[str, Any]) -> str:
    """The fingerprint of the tensors of each part, by name, and of what else decides pictures."""
    digest = hashlib.sha256()
    for part, tensors in parts.items():
        for name, held in sorted(tensors.items()):
            digest.update(f"{part}/{name} {held.dtype} {list(held.shape)}\n".encode())
            for piece in _pieces(held):
                digest.update(piece.view(torch.uint8).numpy())
    digest.update(json.dumps(dict(configs), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _pieces(held: LazyTensor) -> Iterator[torch.Tensor]:
    size = prod(held.shape)
    if size <= _WHOLE:
        yield held.read(0, size)
        return
    for i in range(_SAMPLES):
        start = i * (size - _SAMPLE) // (_SAMPLES - 1)
        yield held.read(start, start + _SAMPLE)


def _configs(folder: Path) -> Iterator[tuple[str, Any]]:
    if (folder / LM_CONFIG).is_file():
        kind, fields = read_config(folder / LM_CONFIG, lm_fields)
        said = {name: value for name, value in fields.items() if value not in (None, False) and name not in _NO_PART}
        yield "backbone", {"model_type": kind, **said, **_rope(fields)}
    if (folder / TOKENIZER_CONFIG).is_file():
        yield "autoencoder", read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published).to_published()
    if (folder / HEAD_CONFIG).is_file():
        config = read_config(folder / HEAD_CONFIG, HeadConfig.from_dict)
        yield "head", {name: getattr(config, name) for name in _HEAD}
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        yield "text tokenizer", {name: content.get(name) for name in _TOKENIZER}
    else:
        for file in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"):
            if (folder / file).is_file():
                yield file, hashlib.sha256((folder / file).read_bytes()).hexdigest()
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_json(folder / ADAPTER_CONFIG)
        yield "adapter", {name: config.get(name) for name in ("r", "lora_alpha", "use_rslora")}


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """How positions turn, from whichever of the three places older and newer configs say it in."""
    said = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    kind = said.pop("type", said.get("rope_type")) or "default"
    theta = said.pop("rope_theta", None) or fields.get("rope_theta")
    rest = {name: value for name, value in said.items() if value is not None}
    return {"rope": {**rest, "rope_type": kind, "rope_theta": theta}}
