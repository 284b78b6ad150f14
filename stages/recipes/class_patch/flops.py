"""Floating point operations of a class-conditional model, counted by torch on tensors without memory."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.noise import ClassNoise
from lfq_tokenizer import TokenizerConfig
from stages.plan.flops import encoder_flops


def picture_flops(shape: ClassPatchConfig) -> float:
    """Of one picture in training, forward and backward; recomputation is not in them."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = ClassPatchModel(shape)
        bits_BChw = torch.ones(1, shape.latent_dim, shape.grid, shape.grid)
        losses = model.losses(bits_BChw, torch.zeros(1, dtype=torch.long), ClassNoise.draw(1, shape, True))
        losses["bits"].mean().backward()
    return float(counter.get_total_flops())


def token_flops(shape: ClassPatchConfig, tokenizer: TokenizerConfig, pixels: bool) -> float:
    """Of one token in training. `pixels`: with what pictures cost that are encoded on the way."""
    side = shape.grid * tokenizer.downsampling
    return (picture_flops(shape) + (encoder_flops(tokenizer, side, side) if pixels else 0.0)) / shape.num_tokens
