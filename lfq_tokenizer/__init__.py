"""Binary picture tokenizer: image ⇄ grid of bits (lookup-free quantisation). Names are imported when they are first used.

from lfq_tokenizer import LFQTokenizer
tokenizer = LFQTokenizer.from_pretrained(folder)
bits_BChw = tokenizer.encode(images_B3HW)       images in [-1, 1], bits in {-1, +1}
images_B3HW = tokenizer.decode(bits_BChw)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Where each public name lives. What handles files and text alone, say `bitdance generate --help`, stays without torch.
_HOME = {
    "HBQTokenizer": "hbq_vae",
    "HierarchicalQuantizer": "hierarchical",
    "LFQTokenizer": "tokenizer",
    "LookupFreeQuantizer": "quantizer",
    "TokenizerConfig": "config",
    "binarize": "binary",
    "load_tokenizer": "any_tokenizer",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from lfq_tokenizer.any_tokenizer import load_tokenizer as load_tokenizer
    from lfq_tokenizer.binary import binarize as binarize
    from lfq_tokenizer.config import TokenizerConfig as TokenizerConfig
    from lfq_tokenizer.hbq_vae import HBQTokenizer as HBQTokenizer
    from lfq_tokenizer.hierarchical import HierarchicalQuantizer as HierarchicalQuantizer
    from lfq_tokenizer.quantizer import LookupFreeQuantizer as LookupFreeQuantizer
    from lfq_tokenizer.tokenizer import LFQTokenizer as LFQTokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lfq_tokenizer' has no attribute {name!r}")
    value = getattr(import_module(f"lfq_tokenizer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
