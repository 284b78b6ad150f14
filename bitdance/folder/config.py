"""A model folder, checked from headers and configs → what its configs say. No weight is loaded.

    config.json, generation_config.json, tokenizer files, model*.safetensors     backbone, as transformers writes it
    ae_config.json, ae.safetensors                                               tokenizer
    vision_head_config.json, vision_head.safetensors                             head
    projector.safetensors                                                        projector
    bitdance.json     ours, optional: defaults, sizes, prompts, card

Source: published checkpoints; `bitdance.json` is absent there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bitdance.folder.diffusers import as_official, is_diffusers
from bitdance.folder.parts import (
    BACKBONE,
    DEMO,
    EXTRAS_FILE,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    LM_CONFIG,
    PROJECTOR_WEIGHTS,
    TOKENIZER_CONFIG,
    TOKENIZER_WEIGHTS,
    part_files,
    read_extras,
)
from bitdance.folder.sizes import SizeRule, check_size, default_size, rule_of_folder
from bitdance.foreign import build_config
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.heads.diffusion.settings import choose
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.sequence.patches import patch_side
from bitdance.values import shown
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.files import check_links
from lfq_tokenizer.json_file import read_config
from lfq_tokenizer.weights import check_depth, check_shapes, read_shapes

KIND = "next_patch"  # of a folder whose bitdance.json names none
LARGEST_SIDE = 4096  # pixels with a <|res_i|> token, where no folder says
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ModelConfig:
    """What the configs of a model say: of one in `folder`, which has been checked, or of one without weights. `backbone` is a
    transformers config as a dictionary, `size` (height, width) in pixels, `extras` the content of `bitdance.json`."""

    name: str
    backbone: Mapping[str, Any]
    head: HeadConfig
    tokenizer: TokenizerConfig
    size: tuple[int, int]
    extras: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    rule: SizeRule | None = None

    @classmethod
    def of_folder(cls, folder: Path | str) -> "ModelConfig":
        """The config of the model in a folder, or of "demo". FileNotFoundError and ValueError as `check_folder`."""
        return check_folder(resolve(folder))

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The settings that fit the model's training."""
        found: Mapping[str, Any] = self.extras.get("defaults", {})
        return found

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the backbone."""
        return int(self.backbone.get("head_dim") or self.backbone["hidden_size"] // self.backbone["num_attention_heads"])

    @property
    def key_heads(self) -> int:
        """Key and value heads of the backbone, fewer than query heads where these share them."""
        return int(self.backbone.get("num_key_value_heads") or self.backbone["num_attention_heads"])

    def blocks(self, height: int, width: int) -> int:
        """M, steps of a picture. ValueError for a size that no model of these parts can make."""
        unit = self.tokenizer.downsampling * patch_side(self.head.parallel_num)
        if height < 1 or width < 1 or height % unit or width % unit or max(height, width) > LARGEST_SIDE:
            raise ValueError(f"{height}×{width} pixels: both sides must be multiples of {unit}, up to {LARGEST_SIDE}")
        return height * width // unit**2

    def check_size(self, height: int, width: int) -> None:
        """ValueError where the model cannot make pictures of this size."""
        if self.rule is not None:
            check_size(self.rule, height, width)
        else:
            self.blocks(height, width)


def resolve(folder: Path | str) -> Path:
    """The folder a user means, in the published layout; "demo" is the bundled model, and of a diffusers folder it is a view in
    that layout. FileNotFoundError says what was looked for."""
    path = DEMO if str(folder) == "demo" else Path(folder)
    if not path.is_dir():
        files = ", ".join((LM_CONFIG, TOKENIZER_CONFIG, HEAD_CONFIG, PROJECTOR_WEIGHTS))
        raise FileNotFoundError(
            f"no model folder {str(folder)!r} (looked for {path.absolute()}); a model is a local folder with "
            f'{files} and their weights. "demo" names the bundled model.'
        )
    check_links(path)
    return as_official(path) if is_diffusers(path) else path


def check_folder(folder: Path) -> ModelConfig:
    """Every file of a model folder in the published layout is there, whole, and fits its config; only headers are read.
    FileNotFoundError or ValueError name the file and the first ten tensors that are missing or of a wrong shape."""
    extras = read_extras(folder)
    if (kind := extras.get("kind", KIND)) != KIND:
        raise ValueError(f"{folder} holds a model of kind {shown(kind)}, not {KIND!r}; bitdance.load_pipeline reads every kind")
    head = read_config(folder / HEAD_CONFIG, HeadConfig.from_dict)
    tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
    lm = read_config(folder / LM_CONFIG, dict)
    built = read_config(folder / LM_CONFIG, build_config)
    for name, value, file, other, expected in (
        ("ch_target", head.ch_target, TOKENIZER_CONFIG, "z_channels", tokenizer.bits),
        ("ch_cond", head.ch_cond, LM_CONFIG, "hidden_size", lm.get("hidden_size")),
    ):
        if value != expected:
            raise ValueError(f"{folder / HEAD_CONFIG}: {name} = {value}, but {other} = {expected} in {file}; must be equal")
    _check_weights(lambda: LFQTokenizer(tokenizer), folder / TOKENIZER_WEIGHTS, tokenizer.layers)
    _check_weights(lambda: BinaryDiffusionHead(head), folder / HEAD_WEIGHTS, head.depth_latent)
    _check_weights(lambda: Projector(head.ch_target, head.ch_cond), folder / PROJECTOR_WEIGHTS)
    found = {name: shape for file in part_files(folder)[BACKBONE] for name, shape in read_shapes(file).items()}
    # Other families may be stored under other names than in memory; there transformers checks while loading.
    if lm.get("model_type") == "qwen3":
        check_depth(built.num_hidden_layers, found, folder / "model*.safetensors")
        backbone = on_meta(lambda: read_config(folder / LM_CONFIG, Backbone.from_config))
        shapes = _shapes(backbone.lm)
        if lm.get("tie_word_embeddings") and "lm_head.weight" not in found:
            del shapes["lm_head.weight"]
        check_shapes(shapes, found, folder / "model*.safetensors")
    rule = rule_of_folder(folder)
    try:
        choose(extras.get("defaults", {}))
    except ValueError as error:
        raise ValueError(f"{folder / EXTRAS_FILE}: {error}") from None
    # `built` also holds what the file leaves to defaults
    return ModelConfig(folder.name, built.to_dict(), head, tokenizer, default_size(rule), extras, folder, rule)


def on_meta(build: Callable[[], Module]) -> Module:
    """What `build` makes, without memory for its weights."""
    with torch.device("meta"):
        return build()


def _check_weights(build: Callable[[], nn.Module], path: Path, layers: int = 1) -> None:
    found = read_shapes(path)
    check_depth(layers, found, path)
    check_shapes(_shapes(on_meta(build)), found, path)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}
