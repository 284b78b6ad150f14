"""A model of any config: from its folder, or of random weights, since speed needs no trained ones."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from bitdance.folder.checkpoint import load_model
from bitdance.folder.config import LARGEST_SIDE, ModelConfig
from bitdance.foreign import build_config, load_text_tokenizer
from bitdance.heads.diffusion.network import BinaryDiffusionHead
from bitdance.model import BitDanceModel
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.networks.quantize import quantize_model
from bitdance.sequence.prompt import BASE_TOKENS, add_image_tokens, build_text_tokenizer
from lfq_tokenizer import LFQTokenizer


def text_tokenizer(config: ModelConfig) -> Any:
    """The text tokenizer of the config's folder; without one, of bytes: a token for each letter of a prompt."""
    if config.folder:
        return load_text_tokenizer(config.folder)
    words = build_text_tokenizer([], 256 + len(BASE_TOKENS))
    return add_image_tokens(words, LARGEST_SIDE // config.tokenizer.downsampling, config.head.parallel_num - 1)


def bare_model(config: ModelConfig) -> BitDanceModel:
    """A model without memory (on the meta device), and without what generation never uses: picture encoder and word scores."""
    words, lm = text_tokenizer(config), build_config(config.backbone)
    with torch.device("meta"):
        tokenizer, backbone = LFQTokenizer(config.tokenizer), Backbone(AutoModel.from_config(lm))
        projector, head = Projector(config.head.ch_target, config.head.ch_cond), BinaryDiffusionHead(config.head)
    tokenizer.encoder = None  # type: ignore[assignment]
    return BitDanceModel(tokenizer, words, projector, backbone, head).eval().requires_grad_(False)


def random_model(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> BitDanceModel:
    """Every weight is drawn where it will lie and in the dtype it will have, so a model takes its own size and no more.

    Matrices keep the size of what passes through them, adaLN and output layers too, which training starts at zero: the
    bits then follow from all of the work, as those of a trained model do.
    """
    model = bare_model(config).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
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
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: str | None = None,
    quantize_head: str | None = None,
) -> BitDanceModel:
    """The folder's weights, or random ones, which are quantised after all of them are there."""
    if config.folder:
        model = load_model(config, device, dtype, True, quantize, quantize_head)
        model.extras.pop("words", None)  # what is timed is no prompt of a user's: nobody needs to hear of its words
        return model
    model = random_model(config, device, dtype)
    quantize_model(model, quantize, quantize_head, device, dtype)
    return model
