"""A BitDance model of a few thousand weights, all of them random, for tests that need no recorded numbers."""

from functools import cache
from typing import Any

import torch

from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.sequence.prompt import add_image_tokens, build_text_tokenizer

BITS, HIDDEN = 6, 32
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}


@cache
def tiny_text_tokenizer() -> Any:
    """Bytes, a few merges, <|res_1|> … <|res_12|>, <|query_1|> … <|query_15|>. Shared: do not add to it."""
    return add_image_tokens(build_text_tokenizer(["a red cube on a table", "a blue ball"], 280), sides=12, queries=15)


def tiny_backbone(seed: int = 0, **changes: Any) -> Backbone:
    config = QWEN3 | {"vocab_size": len(tiny_text_tokenizer())} | changes
    return Backbone.from_config(config, generator=torch.Generator().manual_seed(seed)).eval()


def tiny_model(P: int = 4, seed: int = 0, **head_changes: Any) -> BitDanceModel:
    generator = torch.Generator().manual_seed(seed)
    config = HeadConfig(BITS, HIDDEN, 128, depth_latent=1, depth_adanln=1, parallel_num=P, **head_changes)
    model = BitDanceModel(
        None,
        tiny_text_tokenizer(),
        Projector(BITS, HIDDEN),
        tiny_backbone(seed),
        BinaryDiffusionHead(config, generator),
    )
    with torch.no_grad():
        for part in (model.projector, model.head):  # also the weights that training starts at zero
            for parameter in part.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_bits(h: int, w: int, seed: int = 0) -> torch.Tensor:
    """(C,h,w) ±1."""
    return torch.randint(2, (BITS, h, w), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
