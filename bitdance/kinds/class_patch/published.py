"""The published files of the class-conditional models → a model of ours. No code of theirs runs, nothing is un-pickled blindly.

    {"model", "optimizer", "epochs", "args", ["ema"]}     a `.pt`: averaged weights first, as in the published sampling script
    name → tensor                                         a `.safetensors` with the same names

The picture tokenizer lies inside as vae.*, and its own file, where one is given, counts in its place, as in the published script.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bitdance.folder.picture_model import PictureModel
from bitdance.folder.published import check_finite, check_said, count_of, filled, plain_tensors
from bitdance.kinds.class_patch.config import HEAD_WIDTH, PUBLISHED, ClassPatchConfig, published_name
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.settings import STEPS
from bitdance.sequence.classes import names_for
from bitdance.values import shown
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_config
from lfq_tokenizer.pt_file import read_content, read_pt, tokenizer_of
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import read_safetensors

PARTS = ("tokenizer", "classes", "config")
STATE_DICTS = ("ema", "model")
_PREFIX = "vae."
_FIELDS = {field.name for field in fields(ClassPatchConfig)}
_SHOWN = (  # by the weights, whatever a file's arguments say
    *("dim", "n_layer", "diff_dim", "diff_layers", "diff_adanln_layers", "latent_dim", "num_classes", "cls_token_num", "grid"),
    "parallel_num",
)


@dataclass(frozen=True)
class Found:
    """A converted model, where its parts came from, and what is worth a warning."""

    model: PictureModel
    published: str | None
    weights_from: str
    tokenizer_from: str
    names_from: str


def read_published(path: Path, parts: Mapping[str, Path]) -> Found:
    """The model of a published file. `parts`: "tokenizer", a file or folder that replaces the vae.* inside; "classes", a
    classes.json; "config", a JSON object of fields that the weights do not say (`n_head` and those of training).

    FileNotFoundError, or ValueError that names the file, for one that is broken, would run code, or is no such model.
    """
    name, state, said = _content(path)
    if "config" in parts:
        said |= read_config(parts["config"], _config_fields)
    body = {key: value for key, value in state.items() if not (isinstance(key, str) and key.startswith(_PREFIX))}
    body = plain_tensors(body, path)
    config = config_of(body, said, path)
    network = filled(partial(ClassPatchModel, config), body, path)
    if "tokenizer" in parts:
        tokenizer, source = _tokenizer_part(parts["tokenizer"]), str(parts["tokenizer"])
    elif len(body) == len(state):
        raise ValueError(f"{path} holds no picture tokenizer (vae.*); give its file with --part tokenizer=FILE")
    else:
        tokenizer, source = tokenizer_of(state, _PREFIX, path), f"{path.name}, vae.*"
    if tokenizer.config.bits != config.latent_dim:
        bits = f"{tokenizer.config.bits} bits per token, the model {config.latent_dim}"
        raise ValueError(f"the tokenizer of {source} has {bits}; give the one that the model was trained with")
    check_finite(network, path)
    check_finite(tokenizer, source)
    names, names_from = names_for(config.num_classes, parts.get("classes"))
    known = published_name(config)
    extras: dict[str, Any] = {"card": {"name": f"BitDance-{known}"}} if known else {}
    if known:
        extras["defaults"] = {
            "guidance_scale": PUBLISHED[known][1],
            "num_inference_steps": STEPS,
            "cfg_schedule": "linear",
        }
    return Found(PictureModel(network, tokenizer.eval(), names, extras), known, name, source, names_from)


def _content(path: Path) -> tuple[str, Mapping[Any, Any], dict[str, Any]]:
    """(where the weights lie in the file, the weights, what the file says of the model)."""
    if path.suffix == ".safetensors":
        return "the file itself", read_safetensors(path), {}
    content = read_content(path)
    for name in STATE_DICTS:
        if isinstance(content.get(name), Mapping):
            arguments = content.get("args")
            said = vars(arguments) if hasattr(arguments, "__dict__") else arguments if isinstance(arguments, Mapping) else {}
            try:
                return name, content[name], _config_fields(dict(said), shown_too=False)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    if any(str(key).startswith("cls_embedding") for key in content):
        return "the file itself", content, {}
    raise ValueError(
        f"{path} holds {listed([shown(key) for key in content], ', ')}; expected the weights of a class-conditional model under "
        f"{' or '.join(STATE_DICTS)}"
    )


def _config_fields(data: Any, shown_too: bool = True) -> dict[str, Any]:
    """Those of our fields that a published config or argument list has; the others are paths, rates, hardware."""
    if not isinstance(data, Mapping):
        raise ValueError(f"a {type(data).__name__}; expected an object")
    if data.get("patch_size", 1) != 1:
        raise ValueError(f"patch_size = {shown(data['patch_size'])}; models that merge tokens were not published; 1 is allowed")
    return {key: value for key, value in data.items() if key in _FIELDS and (shown_too or key not in _SHOWN)}


def config_of(state: Mapping[str, Tensor], said: Mapping[str, Any], path: Path) -> ClassPatchConfig:
    """The shape that the weights have, and what they do not show from `said` or as published."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"{path} has no tensor {name}; it is no class-conditional model of this family")
        found = tuple(state[name].shape)
        if len(found) != dimensions or 0 in found:
            raise ValueError(f"{path}: {name} has shape {list(found)}; expected {dimensions} dimensions")
        return found

    (dim,) = shape("norm.weight", 1)
    rows, columns = shape("cls_embedding.weight", 2)
    tokens, _ = shape("pos_for_diff.weight", 2)
    head_width, bits = shape("head.net.input_proj.weight", 2)
    if columns % dim or math.isqrt(tokens) ** 2 != tokens or rows < 2:
        raise ValueError(f"{path}: a class embedding of {rows} × {columns} and {tokens} tokens do not fit a width of {dim}")
    shown_by_weights = {
        "dim": dim,
        "n_layer": count_of(state, "layers.{}.attention_norm.weight"),
        "diff_dim": head_width,
        "diff_layers": count_of(state, "head.net.res_blocks.{}.w1.weight"),
        "diff_adanln_layers": count_of(state, "head.net.ada_ln_blocks.{}.weight"),
        "latent_dim": bits,
        "num_classes": rows - 1,
        "cls_token_num": columns // dim,
        "grid": math.isqrt(tokens),
        "parallel_num": 1 + (shape("query_token", 3)[1] if "query_token" in state else 0),
    }
    check_said(said, shown_by_weights, path)
    if "n_head" not in said and dim % HEAD_WIDTH:
        raise ValueError(
            f"{path} does not say its attention heads, and its width {dim} is no multiple of {HEAD_WIDTH}, the published width "
            'of one; say it with --part config=FILE, a JSON object such as {"n_head": 2}'
        )
    try:
        config = ClassPatchConfig(**{"n_head": max(1, dim // HEAD_WIDTH), **said, **shown_by_weights})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = published_name(config)
    if known and "perturb_rate" not in said:
        config = replace(config, perturb_rate=PUBLISHED[known][0].perturb_rate)
    return config


def _tokenizer_part(path: Path) -> LFQTokenizer:
    """Of a `.pt` file, or of a folder that holds ae_config.json and ae.safetensors."""
    return LFQTokenizer.from_pretrained(path) if path.is_dir() else read_pt(path)[0]
