"""The model that a run starts from: an earlier stage, a pretrained LLM, or fresh weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bitdance.folder.checkpoint import load_model
from bitdance.foreign import build_config, load_text_tokenizer
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.sequence.prompt import add_image_tokens, build_text_tokenizer
from bitdance.sequence.vocabulary import MOST, words_of
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.any_tokenizer import check_makes_bits
from lfq_tokenizer.files import check_links
from lfq_tokenizer.json_file import read_config, read_json
from stages.config import GeneratorTraining
from stages.engine.checkpoint import model_folder
from stages.recipes.chain import check_chain
from stages.recipes.generator.lora import add_lora, check_lora

LARGEST_SIDE = 4096  # pixels; the published vocabularies name sides up to this


def start_model(training: GeneratorTraining, texts: Callable[[], Sequence[str]], dtype: torch.dtype) -> BitDanceModel:
    """The whole model on the CPU, its trained parts in `dtype`, the tokenizer in float32. New weights are drawn from torch's
    global source. `texts` gives what a fresh text tokenizer learns from.

    ValueError names what is missing or does not fit.
    """
    t = training
    if t.init:
        model = load_model(model_folder(t.init), device="cpu", dtype=torch.float32).train()
        named = LFQTokenizer.from_pretrained(model_folder(t.tokenizer)).float() if t.tokenizer else None
        head = check_chain(model, t, named)
        if t.lora:
            check_lora(t, model, head)
        model.head.config = head
        if t.resolution_tokens > len(model.special.res_ids):
            model = with_sides(model, t.resolution_tokens)
        for part in (model.backbone, model.projector, model.head):
            part.to(dtype)
        if t.lora:
            add_lora(model, t.lora)
        return model
    if not t.tokenizer:
        raise ValueError("generator.tokenizer is empty; name a folder with ae_config.json and ae.safetensors")
    tokenizer = LFQTokenizer.from_pretrained(model_folder(t.tokenizer)).float()
    if not t.pretrained and not t.backbone:
        raise ValueError("give generator.pretrained (a folder with an LLM) or [generator.backbone] (a Qwen3 config)")
    config = _backbone_config(t)
    check_makes_bits(tokenizer.config, f"generator.tokenizer = {t.tokenizer!r}")
    head = HeadConfig.from_dict({"ch_target": tokenizer.config.bits, "ch_cond": int(config["hidden_size"]), **t.head})
    sides = t.resolution_tokens or LARGEST_SIDE // tokenizer.downsampling
    if t.pretrained:
        text_tokenizer = load_text_tokenizer(t.pretrained)
        add_image_tokens(text_tokenizer, sides, head.parallel_num - 1)
        backbone = Backbone.from_pretrained(t.pretrained, dtype)
        if backbone.vocabulary_size < len(text_tokenizer):
            backbone.grow_vocabulary(len(text_tokenizer))
        words: list[str] = []  # an LLM knows more than anyone can list
    else:
        captions = texts()
        text_tokenizer = add_image_tokens(build_text_tokenizer(captions, t.text_vocabulary), sides, head.parallel_num - 1)
        words = sorted(words_of(captions))
        backbone = Backbone.from_config({"model_type": "qwen3", **t.backbone, "vocab_size": len(text_tokenizer)}, dtype)
    projector = Projector(head.ch_target, head.ch_cond).to(dtype)
    extras = {"words": words} if 0 < len(words) <= MOST else {}
    return BitDanceModel(tokenizer, text_tokenizer, projector, backbone, BinaryDiffusionHead(head).to(dtype), extras)


def with_sides(model: BitDanceModel, sides: int) -> BitDanceModel:
    """The model with <|res_i|> tokens for sides up to `sides`, the new ones fresh."""
    text_tokenizer = add_image_tokens(model.text_tokenizer, sides, model.block_size - 1)
    if model.backbone.vocabulary_size < len(text_tokenizer):
        model.backbone.grow_vocabulary(len(text_tokenizer))
    grown = BitDanceModel(model.tokenizer, text_tokenizer, model.projector, model.backbone, model.head).train()
    grown.extras = model.extras
    return grown


def _backbone_config(training: GeneratorTraining) -> dict[str, Any]:
    """Of the pretrained folder where there is one; what [generator.backbone] says beside it must then be so."""
    if not training.pretrained:
        return dict(training.backbone)
    path = Path(training.pretrained) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"generator.pretrained: {path} does not exist; name a local folder in transformers' layout")
    check_links(path.parent)
    read_config(path, build_config)  # ValueError for what no backbone can be made of
    config: dict[str, Any] = read_json(path)
    if "hidden_size" not in config:
        raise ValueError(f"{path} does not say hidden_size, the width of the model; is it a config of a language model?")
    for name, value in training.backbone.items():
        if config.get(name, value) != value:
            said = f"{path}: {name} = {config[name]!r:.60}, but generator.backbone says {value!r}"
            raise ValueError(f"{said}; is it the model meant?")
    return config
