"""The memory that the pictures of a run take, told from the folder's configs before a weight is read."""

import torch

from bitdance.costs.memory import free_bytes
from bitdance.kinds.class_patch.folder import ClassFolder
from bitdance.kinds.class_patch.model import ClassPatchModel
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.files import size_text
from lfq_tokenizer.strips import decoding_bytes


def needed(found: ClassFolder, batch: int, itemsize: int, guided: bool) -> int:
    """Bytes at the peak: weights without the picture encoder, and keys and values of the batch or the decoding of one picture."""
    with torch.device("meta"):
        network, tokenizer = ClassPatchModel(found.config), LFQTokenizer(found.tokenizer)
    weights = sum(p.numel() for part in (network, tokenizer.decoder) for p in part.parameters())
    c, rows = found.config, batch * (1 + guided)
    kept = 2 * c.n_layer * rows * (network.prefix_length + c.num_tokens) * c.dim
    decoding = decoding_bytes(found.tokenizer, found.side, found.side, itemsize, strips=False)
    return itemsize * weights + max(itemsize * kept, decoding)


def check_memory(found: ClassFolder, batch: int, itemsize: int, guided: bool, device: str, name: str) -> None:
    """ValueError where a batch does not fit, with what would: fewer pictures at once, smaller numbers."""
    free, wanted = free_bytes(device), needed(found, batch, itemsize, guided)
    if free is None or wanted <= free:
        return
    smaller = [(size, width) for width in (itemsize, 2) for size in (batch >> n for n in range(1, batch.bit_length()))]
    fits = next((one for one in smaller if needed(found, *one, guided) <= free), None)
    advice = "no option makes it fit; use a machine with more memory"
    if fits:
        advice = f"add --batch-size {fits[0]}{' --dtype bfloat16' if fits[1] < itemsize else ''}"
    raise ValueError(f"{name} needs about {size_text(wanted)} on {device}, {size_text(free)} are free: {advice}")
