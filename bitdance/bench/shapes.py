"""Published shapes, and a model of random weights at any shape: speed needs no trained weights.

Source: published configs (BitDance paper, arXiv 2602.14041; Qwen3-14B). `mid` is ours, for CPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from bitdance.backbone import Backbone
from bitdance.checkpoint import LM_CONFIG, check_folder, load_model, resolve
from bitdance.foreign import build_config, load_text_tokenizer
from bitdance.head import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.projector import Projector
from bitdance.prompt import BASE_TOKENS, add_image_tokens, build_text_tokenizer
from bitdance.quantize import quantize_model
from bitdance.sizes import TOKENIZER_CONFIG, check_size, default_size, read_extras, rule_of_folder
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.json_file import read_config

LARGEST_SIDE = 4096  # pixels with a <|res_i|> token


@dataclass(frozen=True)
class Shape:
    """Of a model in `folder`, or of one that is only a shape. `backbone` is a transformers config as a dictionary, `size`
    (height, width) in pixels, `defaults` as in `bitdance.json`."""

    name: str
    backbone: Mapping[str, Any]
    head: HeadConfig
    tokenizer: TokenizerConfig
    size: tuple[int, int]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def of_folder(cls, folder: Path | str) -> "Shape":
        """Of a model folder, or of "demo"; no weight is read. FileNotFoundError and ValueError as `load_model`."""
        folder = resolve(folder)
        head, rule = check_folder(folder), rule_of_folder(folder)
        tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
        defaults = read_extras(folder).get("defaults", {})
        backbone = read_config(folder / LM_CONFIG, build_config).to_dict()  # with what the file leaves to defaults
        return cls(folder.name, backbone, head, tokenizer, default_size(rule), defaults, folder)

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the backbone."""
        return int(self.backbone.get("head_dim") or self.backbone["hidden_size"] // self.backbone["num_attention_heads"])

    @property
    def key_heads(self) -> int:
        """Key and value heads of the backbone, fewer than query heads where these share them."""
        return int(self.backbone.get("num_key_value_heads") or self.backbone["num_attention_heads"])

    def blocks(self, height: int, width: int) -> int:
        """M, steps of a picture. ValueError where the shape cannot make the size."""
        unit = self.tokenizer.downsampling * self.head.patch_side
        if height < 1 or width < 1 or height % unit or width % unit or max(height, width) > LARGEST_SIDE:
            raise ValueError(f"{height}×{width} pixels: both sides must be multiples of {unit}, up to {LARGEST_SIDE}")
        return height * width // unit**2

    def check_size(self, height: int, width: int) -> None:
        """ValueError where it cannot make pictures of this size."""
        if self.folder:
            check_size(self.folder, height, width)
        else:
            self.blocks(height, width)

    def text_tokenizer(self) -> Any:
        """The folder's; without one, of bytes: a token for each letter of a prompt."""
        if self.folder:
            return load_text_tokenizer(self.folder)
        text_tokenizer = build_text_tokenizer([], 256 + len(BASE_TOKENS))
        return add_image_tokens(text_tokenizer, LARGEST_SIDE // self.tokenizer.downsampling, self.head.parallel_num - 1)


def _published(P: int) -> Shape:
    backbone = {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 17408,
        "vocab_size": 151_669 + LARGEST_SIDE // 16 + P - 1,  # words, sides, queries
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
    }
    head = HeadConfig(32, 5120, 5120, depth_latent=6, depth_adanln=2, parallel_num=P)
    return Shape(f"14b-{P}x", backbone, head, TokenizerConfig(), (1024, 1024))


_MID = Shape(
    "mid",
    {
        "model_type": "qwen3",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 1024,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
    },
    HeadConfig(32, 512, 512, depth_latent=6, depth_adanln=2, parallel_num=16),
    TokenizerConfig(ch=64),
    (256, 256),
    {"num_inference_steps": 25},
)

SHAPES = {shape.name: shape for shape in (_published(64), _published(16), _MID)}


def bare_model(shape: Shape) -> BitDanceModel:
    """Without memory (on the meta device), and without what generation never uses: picture encoder and word scores."""
    text_tokenizer, config = shape.text_tokenizer(), build_config(shape.backbone)
    with torch.device("meta"):
        tokenizer, backbone = LFQTokenizer(shape.tokenizer), Backbone(AutoModel.from_config(config))
        projector, head = Projector(shape.head.ch_target, shape.head.ch_cond), BinaryDiffusionHead(shape.head)
    tokenizer.encoder = None  # type: ignore[assignment]
    return BitDanceModel(tokenizer, text_tokenizer, projector, backbone, head).eval().requires_grad_(False)


def random_model(shape: Shape, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> BitDanceModel:
    """Every weight is drawn where it will lie and in the dtype it will have, so a model takes its own size and no more.

    Matrices keep the size of what passes through them, adaLN and output layers too, which training starts at zero: the
    bits then follow from all of the work, as those of a trained model do.
    """
    model = bare_model(shape).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                fan_in = 1 if isinstance(module, nn.Embedding) else weight[0].numel()
                weight.normal_(std=fan_in**-0.5, generator=generator)
            elif name == "weight":
                weight.fill_(1.0)  # of a norm
            else:
                weight.normal_(std=0.02, generator=generator)
    rotary = model.backbone.lm.base_model.rotary_emb  # its frequencies are no weights
    model.backbone.lm.base_model.rotary_emb = type(rotary)(config=model.backbone.lm.config).to(device)
    return model


def open_model(
    shape: Shape,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: str | None = None,
    quantize_head: str | None = None,
) -> BitDanceModel:
    """The folder's weights, or random ones, which are quantised after all of them are there."""
    if shape.folder:
        return load_model(shape.folder, device, dtype, True, quantize, quantize_head)
    model = random_model(shape, device, dtype)
    quantize_model(model, quantize, quantize_head, device, dtype)
    return model
