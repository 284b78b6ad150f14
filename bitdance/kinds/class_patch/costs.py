"""The memory that pictures take, told from the folder's configs before a weight is read: for `generate` and `bitdance doctor`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from bitdance.costs.memory import free_bytes, own_bytes
from bitdance.kinds.class_patch.folder import ClassFolder, check_folder
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.networks.precision import DTYPES, resolve_dtype, usable_device
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.files import size_text
from lfq_tokenizer.strips import decoding_bytes


def phases(found: ClassFolder, batch: int, itemsize: int, guided: bool) -> dict[str, dict[str, int]]:
    """Bytes by phase and part: weights without the picture encoder; keys and values of the batch; the decoding of one picture."""
    with torch.device("meta"):
        network, tokenizer = ClassPatchModel(found.config), LFQTokenizer(found.tokenizer)
    network_bytes, decoder_bytes = (itemsize * sum(p.numel() for p in part.parameters()) for part in (network, tokenizer.decoder))
    weights = {"network": network_bytes, "decoder": decoder_bytes}
    c, rows = found.config, batch * (1 + guided)
    cache = itemsize * 2 * c.n_layer * rows * (network.prefix_length + c.num_tokens) * c.dim
    decoding = decoding_bytes(found.tokenizer, found.side, found.side, itemsize, strips=False)
    return {"tokens": weights | {"cache": cache}, "decode": weights | {"decoding": decoding}}


def needed(found: ClassFolder, batch: int, itemsize: int, guided: bool) -> int:
    """Bytes at the peak."""
    return max(sum(parts.values()) for parts in phases(found, batch, itemsize, guided).values())


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


def needs_of_batch(options: argparse.Namespace) -> dict[str, Any]:
    """The needs of a batch, as JSON values. ValueError for options that are not for class models."""
    refuse(options, "height", "width", "quantize", "quantize_head", "offload", "measure")
    found, device = check_folder(Path(options.model)), usable_device(options.device)
    dtype, batch = resolve_dtype(options.dtype, device), options.batch_size or 1
    guided = options.guidance is None or options.guidance > 1
    parts = phases(found, batch, DTYPES[dtype].itemsize, guided)
    phase = max(parts, key=lambda name: sum(parts[name].values()))
    program, free = (own_bytes() or 0) if device == "cpu" else 0, free_bytes(device)
    wanted = sum(parts[phase].values())
    return {
        "shape": Path(options.model).name,
        "height": found.side,
        "width": found.side,
        "batch": batch,
        "dtype": dtype,
        "guided": guided,
        "device": device,
        "needs_bytes": wanted + program,
        "main_memory_bytes": 0,
        "phase": phase,
        "phases": {name: {**of_phase, **({"program": program} if program else {})} for name, of_phase in parts.items()},
        "free_bytes": free,
        "fits": free is None or wanted <= free,
    }


def refuse(options: argparse.Namespace, *names: str) -> None:
    """ValueError for the first of these options that was given."""
    if given := next((name for name in names if getattr(options, name)), None):
        raise ValueError(f"--{given.replace('_', '-')} is for text models; leave it out for a class model")
