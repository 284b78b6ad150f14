"""Binary picture tokenizer: image ⇄ grid of bits (lookup-free quantisation).

    from lfq_tokenizer import LFQTokenizer
    tokenizer = LFQTokenizer.from_pretrained(folder)
    bits_BChw = tokenizer.encode(images_B3HW)       images in [-1, 1], bits in {-1, +1}
    images_B3HW = tokenizer.decode(bits_BChw)
"""

from lfq_tokenizer.binarize import binarize
from lfq_tokenizer.config import TokenizerConfig
from lfq_tokenizer.quantizer import LookupFreeQuantizer
from lfq_tokenizer.tokenizer import LFQTokenizer

__all__ = ["LFQTokenizer", "LookupFreeQuantizer", "TokenizerConfig", "binarize"]
