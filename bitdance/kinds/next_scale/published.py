"""The published files of VAR and Infinity → a model of ours. No code of theirs runs, nothing is un-pickled blindly.

    VAR        name → tensor, or a trainer's {"trainer": {"var_wo_ddp": …}}
    Infinity   name → tensor, {"trainer": {"gpt_fsdp": …}}, or a folder with shards and their index

The tokenizer lies in a file of its own, and of a model of prompts so does the text encoder.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
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
from bitdance.kinds.next_scale.config import INFINITY_1M, VAR_256, VAR_512, NextScaleConfig
from bitdance.kinds.next_scale.network import NextScaleNetwork
from bitdance.kinds.next_scale.settings import NAMES, PRESETS, NextScaleSettings
from lfq_tokenizer.any_tokenizer import load_tokenizer
from lfq_tokenizer.pt_file import read_content
from lfq_tokenizer.scale_file import read_scales
from lfq_tokenizer.scale_vae import ScaleTokenizer
from lfq_tokenizer.scales import squares
from lfq_tokenizer.weights import read_safetensors

PARTS = ("tokenizer", "text_encoder", "classes", "config")
T = TypeVar("T")
_NAMES = (
    (".sa.", ".attn."),
    (".ca.", ".cross."),
    ("scale_mul_1H11", "scale_mul"),
    ("text_proj_for_sos.cross.", "text_pool."),
    ("text_proj_for_ca.", "text_proj."),
)
BUFFERS = ("lvl_1L", "attn_bias_for_masking")


def renamed(state: Mapping[str, T], chunk: int = 0) -> dict[str, T]:
    """The tensors of a published transformer under our names. Buffers that follow from the shape are left out; blocks that
    come in chunks (0: as large as the names show) get one number each."""
    found: dict[str, T] = {}
    for name, tensor in flat_blocks(state, chunk).items():
        if name in BUFFERS or name.endswith("zero_k_bias"):
            continue
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


def read_published(path: Path, parts: Mapping[str, Path]) -> tuple[PictureModel, dict[str, Any]]:
    """The model of a published file or folder, and what it says of where its parts came from.

    `parts`: "tokenizer", a published `.pth` or a folder; "text_encoder", a folder as transformers keeps it; "classes", a
    classes.json; "config", a JSON object of fields that the weights do not say (sides, and those of training).
    FileNotFoundError, or ValueError that names the file, for one that is broken, would run code, or is no such model.
    """
    source, said = need_tokenizer(path, parts), said_in(parts)
    name, published = _content(path)
    state = renamed(published)
    config = config_of(published, state, said, "text_norm.weight" in state, path)
    tokenizer = load_tokenizer(source) if source.is_dir() else read_scales(source, len(config.sides))
    if source.is_file() and config.tokens == "bits" and 4 * tokenizer.config.latents == config.latents:
        tokenizer = tokenizer.patchified()
    if not isinstance(tokenizer, ScaleTokenizer) or tokenizer.config.token != config.token:
        raise ValueError(f"{source} makes tokens of {tokenizer.config.token}, the model reads {config.token}; give its own")
    if not tokenizer.config.sides:  # neither file says it of the tokenizer
        tokenizer.config = replace(tokenizer.config, sides=config.sides)
    network = filled(partial(NextScaleNetwork, config), state, path)
    return put_together(path, name, network, tokenizer, _extras(config), parts)


def config_of(
    published: Mapping[str, Tensor], state: Mapping[str, Tensor], said: Mapping[str, Any], text: bool, path: Path
) -> NextScaleConfig:
    """The shape that the weights have, and what they do not show from `said` or as published."""
    heads = shape_of(state, "blocks.0.attn.scale_mul", path)[1]
    width, latents = shape_of(state, "word_embed.weight", path)
    outputs = shape_of(state, "head.weight", path)[0]
    by_weights: dict[str, Any] = {
        "condition": "text" if text else "class",
        "tokens": "bits" if outputs == 2 * latents and text else "codes",
        "width": width,
        "depth": count_of(state, "blocks.{}.attn.proj.weight"),
        "heads": heads,
        "inner": shape_of(state, "blocks.0.ffn.fc1.weight", path)[0],
        "latents": latents,
        "shared_ada": "shared_ada_lin.1.weight" in state,
        "rotary": "pos_1LC" not in state,
    }
    by_weights["values"] = 2 if by_weights["tokens"] == "bits" else outputs
    if text:
        by_weights |= dict(zip(("text_tokens", "text_width"), shape_of(state, "cfg_uncond", path), strict=True))
        by_weights["levels"] = shape_of(state, "lvl_embed.weight", path)[0]
        sides: Any = INFINITY_1M
    else:
        by_weights["num_classes"] = shape_of(state, "class_emb.weight", path)[0] - 1
        sides = _sides(published, shape_of(state, "pos_1LC", path)[1])
    check_said(said, by_weights, path)
    try:
        config = NextScaleConfig.from_dict({"sides": sides, **said, **by_weights})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not config.rotary and config.length != len(state["pos_1LC"][0]):
        raise ValueError(
            f"{path} has positions for {len(state['pos_1LC'][0])} tokens, its scales {config.length}; say them with --part "
            'config=FILE, a JSON object such as {"sides": [1, 2, 3, 4]}'
        )
    return config


def _sides(published: Mapping[str, Tensor], length: int) -> Any:
    """The squares whose tokens the table of levels counts, else those of a published model of so many tokens."""
    if "lvl_1L" in published:
        levels = published["lvl_1L"].flatten().long()
        counts = torch.bincount(levels).tolist()
        if all(math.isqrt(count) ** 2 == count for count in counts):
            return tuple(math.isqrt(count) for count in counts)
    return VAR_512 if length == sum(h * w for h, w in squares(VAR_512)) else VAR_256


def _content(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(where the weights lie, the weights)."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} holds no .safetensors; give the folder of the published shards")
        return "its shards", {name: tensor for file in files for name, tensor in read_safetensors(file).items()}
    if path.suffix == ".safetensors":
        return "the file itself", read_safetensors(path)
    content: Any = read_content(path)
    trainer = content.get("trainer")
    for name in ("var_wo_ddp", "gpt_fsdp"):
        if isinstance(trainer, Mapping) and isinstance(trainer.get(name), Mapping):
            return f"trainer.{name}", plain_tensors(trainer[name], path, BUFFERS)
    return "the file itself", plain_tensors(content, path, BUFFERS)


def _extras(config: NextScaleConfig) -> dict[str, Any]:
    """Settings that published figures were made with."""
    preset = "VAR" if config.condition == "class" else "Infinity-8B" if config.width >= 3584 else "Infinity-2B"
    settings, plain = PRESETS[preset], NextScaleSettings()
    assert settings is not None
    own = {key: getattr(settings, key) for key in NAMES if getattr(settings, key) != getattr(plain, key)}
    card = {"card": {"name": config.known[0]}} if config.known else {}
    return {"defaults": {"guidance_scale": settings.guidance, **own}, **card}
