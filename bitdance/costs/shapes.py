"""Configs of published models, and of one for CPUs: what they cost is known without their weights.

Source: published configs (BitDance paper, arXiv 2602.14041; Qwen3-14B). `mid` is ours.
"""

from bitdance.folder.config import LARGEST_SIDE, ModelConfig
from bitdance.heads.diffusion.network import HeadConfig
from lfq_tokenizer import TokenizerConfig


def _published(P: int) -> ModelConfig:
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
    return ModelConfig(f"14b-{P}x", backbone, head, TokenizerConfig(), (1024, 1024))


_MID = ModelConfig(
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
    {"defaults": {"num_inference_steps": 25}},
)

SHAPES = {shape.name: shape for shape in (_published(64), _published(16), _MID)}
