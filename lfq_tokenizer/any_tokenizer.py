"""All architectures behind one door: a folder's `ae_config.json` says which picture tokenizer lies beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lfq_tokenizer.config import TokenizerConfig
from lfq_tokenizer.folder import read_folder
from lfq_tokenizer.hbq_vae import HBQConfig, HBQTokenizer
from lfq_tokenizer.scale_vae import ScaleConfig, ScaleTokenizer
from lfq_tokenizer.strips import decoding_bytes as _decoding_bytes
from lfq_tokenizer.tokenizer import LFQTokenizer

BitTokenizer: TypeAlias = LFQTokenizer | HBQTokenizer  # one grid of bits per picture
PictureTokenizer: TypeAlias = LFQTokenizer | HBQTokenizer | ScaleTokenizer
PictureTokenizerConfig: TypeAlias = TokenizerConfig | HBQConfig | ScaleConfig


def config_of(data: Any) -> PictureTokenizerConfig:
    """From the JSON object of an `ae_config.json`. ValueError for unknown keys and values."""
    if isinstance(data, Mapping) and ("hbq" in data or "scales" in data):
        return HBQConfig.from_published(data) if "hbq" in data else ScaleConfig.from_published(data)
    return TokenizerConfig.from_published(data)


def build_tokenizer(config: PictureTokenizerConfig) -> PictureTokenizer:
    """A tokenizer with fresh weights."""
    if isinstance(config, ScaleConfig):
        return ScaleTokenizer(config)
    return HBQTokenizer(config) if isinstance(config, HBQConfig) else LFQTokenizer(config)


def load_tokenizer(folder: Path | str) -> PictureTokenizer:
    """Read `ae_config.json` and `ae.safetensors` of a folder, or of "demo". FileNotFoundError or ValueError name the file."""
    return read_folder(build_tokenizer, config_of, folder)


def check_makes_bits(config: PictureTokenizerConfig, name: str) -> None:
    """ValueError where tokens are numbers; `name` is who says so."""
    if not config.bits:
        raise ValueError(f'{name} makes tokens of {config.token}; this needs bits: a tokenizer with quantizer = "lfq" or "hbq"')


def decoding_bytes(config: PictureTokenizerConfig, height: int, width: int, itemsize: int, strips: bool) -> int:
    """Bytes that decoding one picture takes beside the weights; only LFQ decoders know strips."""
    if isinstance(config, ScaleConfig):
        return 6 * config.ch * height * width * itemsize
    if isinstance(config, HBQConfig):
        return 5 * 2 * config.dec_dim * height * width // 4 * itemsize
    return _decoding_bytes(config, height, width, itemsize, strips)
