"""Floating point operations of training, in closed form: a product of (m,k) and (k,n) is 2·m·k·n; elementwise work is left out.

The forward pass of a part counts once, its backward pass twice where the part trains (gradients of weights and of inputs), once
where gradients only pass through it, and not at all where nothing before it trains. Tests compare with torch's own counter.

h, w token grid, N = h·w, P tokens per block, D hidden size, W width of the head, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bitdance.model import BitDanceModel
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig, build_tokenizer


@dataclass(frozen=True)
class Document:
    """A picture of `h` × `w` tokens behind `text` tokens of prompt (mean values need not be whole), `P` tokens per block."""

    text: float
    h: int
    w: int
    P: int

    @property
    def image(self) -> int:
        """N, predicted tokens."""
        return self.h * self.w

    @property
    def length(self) -> float:
        """Positions: text, vision_start, res_h, block 0, the picture, vision_end."""
        return self.text + 2 + self.P + self.image + 1

    @property
    def pairs(self) -> float:
        """(query, key) pairs of the block-causal mask."""
        causal, blocks = self.text + 2, self.image // self.P + 1
        in_blocks = self.P * (blocks * causal + self.P * blocks * (blocks + 1) / 2)
        return causal * (causal + 1) / 2 + in_blocks + self.length


@dataclass(frozen=True)
class Flops:
    """Of one document. `recomputed` comes on top where activations are checkpointed."""

    layers: float
    attention: float
    logits: float
    projector: float
    head: float
    encoder: float
    recomputed: float

    @property
    def useful(self) -> float:
        """Without recomputation: what a share of the machine's peak (MFU) refers to."""
        return self.layers + self.attention + self.logits + self.projector + self.head + self.encoder


def document_flops(model: BitDanceModel, document: Document, encoder: float = 0.0) -> Flops:
    """Of one training pass over `document`; `encoder` is what `encoder_flops` gives where its picture comes as pixels.

    Only shapes and `requires_grad` are read, so the model may be one without memory. Read it before it is partitioned.
    """
    base, config = model.backbone.lm.base_model, model.backbone.lm.config
    trains = [any(p.requires_grad for p in part.parameters()) for part in (model.projector, model.backbone, model.head)]
    projector, backbone, head = (_passes(trains[i], any(trains[:i])) for i in range(3))
    if any(".lora_" in name for name, _ in model.named_parameters()):
        return _beside_frozen(model, document, encoder, trains[1])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = 2 * _products(base) * document.length
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * document.pairs
    logits = 2 * model.backbone.hidden_size * model.backbone.vocabulary_size * document.text
    blocks, once = _head(model, document)
    return Flops(
        layers * backbone,
        attention * backbone,
        logits * backbone,
        2 * _products(model.projector) * document.image * projector,
        (blocks + once) * head,
        encoder,
        layers + attention + blocks - 2 * _left_out(base) * document.length,
    )


def _beside_frozen(model: BitDanceModel, document: Document, encoder: float, below: bool) -> Flops:
    """The same where an adapter trains: gradients pass through frozen matrices, and none are made of the matrices themselves.
    `below`: the backbone has a part of the adapter."""
    base, config, net = model.backbone.lm.base_model, model.backbone.lm.config, model.head.net
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * document.pairs
    text = 2 * model.backbone.hidden_size * model.backbone.vocabulary_size * document.text
    forward, trained = (2 * _products(base, only) * document.length for only in (False, True))
    blocks, once = _head(model, document)
    rows = 2 * document.image * model.head.config.diff_batch_mul
    return Flops(
        (2 * forward + trained) if below else forward,
        attention * (3 if below else 1),
        text * (2 if below else 1),
        2 * _products(model.projector) * document.image,
        2 * (blocks + once) + rows * _products(net, trained=True),
        encoder,
        forward + attention + blocks - 2 * _left_out(base) * document.length,
    )


def token_flops(model: BitDanceModel, grids: Mapping[tuple[int, int], float], text: float, pixels: bool = False) -> float:
    """Training operations of one average token, without recomputation: what turns tokens per second into MFU.

    `grids` gives token grids (h, w) their shares of the pictures, `text` is the mean number of prompt tokens; `pixels`: the
    training device encodes the pictures.
    """
    flops = tokens = 0.0
    for (h, w), share in grids.items():
        document = Document(text, h, w, model.block_size)
        encoding = 0.0
        if pixels:
            assert model.tokenizer is not None
            s = model.tokenizer.downsampling
            encoding = encoder_flops(model.tokenizer.config, h * s, w * s)
        flops += share * document_flops(model, document, encoding).useful
        tokens += share * document.length
    return flops / tokens


def encoder_flops(config: PictureTokenizerConfig, height: int, width: int) -> float:
    """Of encoding one picture, counted by torch on tensors without data."""
    with torch.device("meta"):
        encoder = build_tokenizer(config).encoder
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            encoder(torch.empty(1, 3, height, width))
    return float(counter.get_total_flops())


def _passes(trains: bool, below: bool) -> int:
    """How often a part's products are computed in a step."""
    return 3 if trains else 2 if below else 1


def _products(module: nn.Module, trained: bool = False) -> int:
    """Multiplications of all linear layers for one row, or of those that train."""
    linears = (m for m in module.modules() if isinstance(m, nn.Linear))
    return sum(m.in_features * m.out_features for m in linears if m.weight.requires_grad or not trained)


def _left_out(base: nn.Module) -> int:
    """Multiplications for one row that computing the layers again leaves out: torch stops a layer where nothing more is kept of
    it, which is ahead of its last product."""
    linears = ([m for m in layer.modules() if isinstance(m, nn.Linear)] for layer in base.layers)
    return sum(found[-1].in_features * found[-1].out_features for found in linears)


def _head(model: BitDanceModel, document: Document) -> tuple[float, float]:
    """Forward pass of the head: its blocks, which checkpointing repeats, and the rest."""
    config, net = model.head.config, model.head.net
    N, P, draws = document.image, document.P, config.diff_batch_mul
    in_blocks = _products(net.res_blocks) + 2 * config.depth_latent * P * config.ch_latent  # attention over P keys, twice
    per_token = sum(_products(part) for part in (net.input_proj, net.ada_ln_blocks, net.final_layer))
    per_block = _products(net.time_embed)
    once = 2 * N * (_products(net.cond_embed) + draws * (per_token + per_block / P))
    return 2 * N * draws * in_blocks, once
