"""The memory that pictures of a model with one network take, told from its folder's configs before a weight is read."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitdance.costs.memory import free_bytes, own_bytes
from bitdance.folder.picture_model import FolderFacts, Layout
from bitdance.networks.precision import DTYPES, resolve_dtype, usable_device
from lfq_tokenizer.any_tokenizer import build_tokenizer, decoding_bytes
from lfq_tokenizer.files import size_text

# what a batch keeps beside the weights: (config, batch, itemsize, guided) → part → bytes
Working = Callable[[Any, int, int, bool], dict[str, int]]


class Costs:
    """`working` is what the kind's loop keeps for a batch."""

    def __init__(self, layout: Layout[Any], working: Working) -> None:
        self.layout, self.working = layout, working

    def phases(self, found: FolderFacts[Any], batch: int, itemsize: int, guided: bool) -> dict[str, dict[str, int]]:
        """Bytes by phase and part: weights without the picture encoder; what the batch keeps; the decoding of one picture."""
        with torch.device("meta"):
            parts = {"network": self.layout.build(found.config), "decoder": build_tokenizer(found.tokenizer).decoder}
        weights = {name: itemsize * sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        weights |= {"text encoder": itemsize * found.text_parameters} if found.text_parameters else {}
        decoding = max(decoding_bytes(found.tokenizer, h, w, itemsize, strips=False) for h, w in found.sizes)
        working = self.working(found.config, batch, itemsize, guided)
        return {"tokens": weights | working, "decode": weights | {"decoding": decoding}}

    def needed(self, found: FolderFacts[Any], batch: int, itemsize: int, guided: bool) -> int:
        """Bytes at the peak."""
        return max(sum(parts.values()) for parts in self.phases(found, batch, itemsize, guided).values())

    def check_memory(self, found: FolderFacts[Any], batch: int, itemsize: int, guided: bool, device: str, name: str) -> None:
        """ValueError where a batch does not fit, with what would: fewer pictures at once, smaller numbers."""
        free, wanted = free_bytes(device), self.needed(found, batch, itemsize, guided)
        if free is None or wanted <= free:
            return
        smaller = [(size, width) for width in (itemsize, 2) for size in (batch >> n for n in range(1, batch.bit_length()))]
        fits = next((one for one in smaller if self.needed(found, *one, guided) <= free), None)
        advice = "no option makes it fit; use a machine with more memory"
        if fits:
            advice = f"add --batch-size {fits[0]}{' --dtype bfloat16' if fits[1] < itemsize else ''}"
        raise ValueError(f"{name} needs about {size_text(wanted)} on {device}, {size_text(free)} are free: {advice}")

    def needs_of_batch(self, options: argparse.Namespace) -> dict[str, Any]:
        """The needs of a batch, as JSON values. ValueError for options that are not for such models."""
        refuse(options, "height", "width", "quantize", "quantize_head", "offload", "measure")
        found, device = self.layout.check(Path(options.model)), usable_device(options.device)
        dtype, batch = resolve_dtype(options.dtype, device), options.batch_size or 1
        guided = options.guidance is None or options.guidance > 1
        parts = self.phases(found, batch, DTYPES[dtype].itemsize, guided)
        phase = max(parts, key=lambda name: sum(parts[name].values()))
        program, free = (own_bytes() or 0) if device == "cpu" else 0, free_bytes(device)
        wanted = sum(parts[phase].values())
        return {
            "shape": Path(options.model).name,
            "height": found.sizes[0][0],
            "width": found.sizes[0][1],
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
        raise ValueError(f"--{given.replace('_', '-')} is for text models of BitDance; leave it out for this one")
