"""Small refinement models with random weights, in folders, for the tests of this kind."""

from pathlib import Path

import torch
from golden_cases import GOLDEN

from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.refine.config import ClassRefineConfig, TextRefineConfig
from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.model import build_network
from bitdance.networks.text_encoder import TextEncoder
from bitdance.sequence.classes import ClassEntry, ClassNames
from lfq_tokenizer import LFQTokenizer

NAMES = ClassNames(tuple(ClassEntry((name,)) for name in ("ant", "bee", "cow")))
DEFAULTS = {"num_inference_steps": 6, "guidance_scale": 2.0, "tau": 1.0}
TEXT_ENCODER = GOLDEN / "t2i_ckpt"  # any language model with a text tokenizer


def tokenizer() -> LFQTokenizer:
    """Of the recorded text model: 8 bits per token."""
    return LFQTokenizer.from_pretrained(GOLDEN / "t2i_ckpt").float()


def shaken(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights in place of the zeros that training starts from, so that the condition matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return network.eval()


def class_model(grid: int = 4, defaults: dict | None = None) -> PictureModel:
    """Of three classes."""
    known = tokenizer()
    config = ClassRefineConfig(
        width=32,
        depth=3,
        heads=2,
        bits=known.config.bits,
        bottleneck=16,
        in_context_len=2,
        in_context_start=1,
        num_classes=3,
        grid=grid,
    )
    network = shaken(build_network(config, torch.Generator().manual_seed(0)))
    return PictureModel(network, known, NAMES, {"defaults": DEFAULTS | (defaults or {})})


def text_model(attention: str = "prefix") -> PictureModel:
    """Of prompts, whose features are those of the recorded language model."""
    known, encoder = tokenizer(), TextEncoder.from_pretrained(TEXT_ENCODER, torch.float32)
    config = TextRefineConfig(
        width=48, depth=2, heads=2, bits=known.config.bits, text_width=encoder.width, attention=attention, grids=((4, 4), (4, 6))
    )
    network = shaken(build_network(config, torch.Generator().manual_seed(0)))
    return PictureModel(network, known, None, {"defaults": DEFAULTS}, encoder)


def saved(model: PictureModel, path: Path) -> Path:
    """The model's folder."""
    LAYOUT.save(model, path)
    return path
