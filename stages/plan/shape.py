"""The model that a config describes, without its weights: from the files that are there, else from what the config says."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bitdance.folder.parts import HEAD_CONFIG, LM_CONFIG, TOKENIZER_CONFIG
from bitdance.foreign import load_text_tokenizer
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.sequence.prompt import BASE_TOKENS, add_image_tokens, build_text_tokenizer
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.any_tokenizer import check_makes_bits
from lfq_tokenizer.json_file import read_config, read_json
from stages.config import PARTS, GeneratorTraining, TrainingConfig
from stages.engine.checkpoint import model_folder
from stages.recipes.chain import check_backbone, stage_head
from stages.recipes.generator.lora import add_lora
from stages.recipes.generator.start import LARGEST_SIDE


@dataclass(frozen=True)
class Shape:
    """`backbone` is a transformers config, `sides` the number of `<|res_i|>` tokens; `absent` are the folders that the config
    names and that are not here, so that its own words had to do."""

    backbone: Mapping[str, Any]
    vocabulary: int
    sides: int
    head: HeadConfig
    tokenizer: TokenizerConfig
    absent: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainingConfig) -> "Shape":
        """ValueError where neither a folder nor the config says what is needed, and where they contradict each other."""
        training = config.generator
        if training.init and (folder := folder_here(training.init)):
            return cls.of_folder(folder, training)
        absent = [f"generator.init = {training.init!r}"] if training.init else []
        tokenizer = config.tokenizer.model
        if not isinstance(tokenizer, TokenizerConfig):
            raise ValueError(f"[tokenizer.model] makes {tokenizer.token}; a generator needs a tokenizer with one grid of bits")
        if folder := folder_here(training.tokenizer):
            tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
        else:
            absent.append(f"generator.tokenizer = {training.tokenizer!r}, whose shape [tokenizer.model] gives,")
        backbone, words = dict(training.backbone), training.text_vocabulary
        if training.pretrained:
            path = Path(training.pretrained) / LM_CONFIG
            if path.is_file():
                backbone = read_config(path, dict)
                words = len(load_text_tokenizer(training.pretrained))
            else:
                absent.append(f"generator.pretrained = {training.pretrained!r}")
        if "hidden_size" not in backbone:
            said = f"{', '.join(absent)} is not here and " if absent else ""
            raise ValueError(f"{said}[generator.backbone] has no hidden_size; give the fields of a Qwen3 config there")
        check_makes_bits(tokenizer, f"generator.tokenizer = {training.tokenizer!r}")
        bits, hidden = tokenizer.bits, int(backbone["hidden_size"])
        head = HeadConfig.from_dict({"ch_target": bits, "ch_cond": hidden, **training.head})
        sides = training.resolution_tokens or LARGEST_SIDE // tokenizer.downsampling
        # a pretrained embedding has spare rows and grows only when they are used up
        spare = int(backbone.get("vocab_size", 0)) if training.pretrained else 0
        vocabulary = max(spare, words + sides + head.parallel_num - 1)
        return cls({"model_type": "qwen3", **backbone}, vocabulary, sides, head, tokenizer, tuple(absent))

    @classmethod
    def of_folder(cls, folder: Path, training: GeneratorTraining, source: str = "") -> "Shape":
        """Of the model in `folder`, which the config calls `source` (default: generator.init), with the training values of
        `training`. ValueError where that contradicts it."""
        backbone: dict[str, Any] = read_json(folder / LM_CONFIG)
        tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
        check_backbone(backbone, training, source)
        head = stage_head(read_config(folder / HEAD_CONFIG, HeadConfig.from_dict), training, source)
        sides = training.resolution_tokens or LARGEST_SIDE // tokenizer.downsampling
        return cls(backbone, int(backbone["vocab_size"]), sides, head, tokenizer)

    def model(self, training: GeneratorTraining, dtype: torch.dtype, layers: int = 0) -> BitDanceModel:
        """As it trains, with fresh weights, or none at all inside a `FakeTensorMode`. The tokenizer is frozen and float32.

        `layers`: with so many layers of the backbone instead of all.
        """
        config = {**self.backbone, "vocab_size": self.vocabulary}
        if layers:
            config |= {"num_hidden_layers": layers}
            config.pop("layer_types", None)
        text_tokenizer = build_text_tokenizer([], 256 + len(BASE_TOKENS))
        add_image_tokens(text_tokenizer, self.sides, self.head.parallel_num - 1)
        tokenizer = LFQTokenizer(self.tokenizer).eval().requires_grad_(False)
        backbone = Backbone.from_config(config, dtype)
        with _default(dtype):  # a fake tensor cannot be converted in place
            projector, head = Projector(self.head.ch_target, self.head.ch_cond), BinaryDiffusionHead(self.head)
        model = BitDanceModel(tokenizer, text_tokenizer, projector, backbone, head).train()
        for part in training.freeze:
            getattr(model, part).requires_grad_(False)
        if training.lora:
            with _default(dtype), patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):  # as above
                add_lora(model, training.lora)
        if training.checkpoint_activations:
            backbone.checkpoint_activations()
            head.net.grad_checkpointing = True
        return model


@dataclass(frozen=True)
class Count:
    """Parameters of one part: all, those that train, and of its largest tensor."""

    all: int
    trained: int
    largest: int


def count(model: BitDanceModel) -> dict[str, Count]:
    """By part, the backbone's by embedding, layers and output; a tied output counts to the embedding."""
    lm, counts = model.backbone.lm, {}
    embedding, output = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    own = [p for p in lm.parameters() if p is not embedding and p is not output]
    counts["backbone: embedding"] = _count([embedding])
    counts["backbone: layers"] = _count(own)
    if output is not embedding:
        counts["backbone: output"] = _count([output])
    for name in PARTS[1:]:
        counts[name] = _count(list(getattr(model, name).parameters()))
    assert model.tokenizer is not None
    counts["tokenizer"] = _count(list(model.tokenizer.parameters()))
    return counts


def _count(parameters: list[torch.nn.Parameter]) -> Count:
    sizes = [p.numel() for p in parameters]
    return Count(sum(sizes), sum(p.numel() for p in parameters if p.requires_grad), max(sizes))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def folder_here(place: str) -> Path | None:
    """The model folder that `place` means, None where it is not here."""
    try:
        return model_folder(place) if place else None
    except FileNotFoundError:
        return None
