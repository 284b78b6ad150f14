"""Parts of the model on the device only in the phases that need them; otherwise they lie in main memory.

    prompt   the backbone's layers; the rows of the embedding are looked up in main memory, and only they move
    loop     the backbone's layers, projector, head
    decode   the tokenizer's decoder

The original of every tensor stays in main memory, so leaving the device costs nothing and only coming is a copy: once per batch,
never per block. Projector and head, a tenth of the bytes, stay once they have come: CUDA graphs hold their addresses, and the
decoder, with what it computes, is smaller than the layers that have left.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitdance.model import BitDanceModel

Phase = Literal["prompt", "loop", "decode"]
NEEDS: dict[Phase, tuple[str, ...]] = {
    "prompt": ("backbone",),
    "loop": ("backbone", "projector", "head"),
    "decode": ("decoder",),
}
STAY = ("projector", "head")


class PhaseOffload:
    """Keeps a model in main memory and `device` for what a phase needs. `resident` names the parts that are on it."""

    def __init__(self, model: "BitDanceModel", device: torch.device | str) -> None:
        """Moves the model to main memory. ValueError when it has no picture tokenizer."""
        if model.tokenizer is None:
            raise ValueError("the model has no picture tokenizer; only a model that makes pictures has these phases")
        self.device = torch.device(device)
        self.resident: set[str] = set()
        model.to("cpu")
        base = model.backbone.lm.base_model
        embedding = base.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.device),))
        embedding.register_forward_hook(lambda module, args, rows: rows.to(self.device))
        self._originals = {
            "backbone": [entry for module in base.modules() if module is not embedding for entry in _entries(module)],
            **{name: _all(part) for name, part in (("projector", model.projector), ("head", model.head))},
            "decoder": _all(model.tokenizer.decoder),
        }

    def enter(self, phase: Phase) -> None:
        """Bring what the phase needs, after everything else has left."""
        for part in self.resident - {*NEEDS[phase], *STAY}:
            for owner, table, name, original in self._originals[part]:
                getattr(owner, table)[name] = original
            self.resident.remove(part)
        for part in NEEDS[phase]:
            if part not in self.resident:
                for owner, table, name, original in self._originals[part]:
                    getattr(owner, table)[name] = self._copied(original)
                self.resident.add(part)

    def _copied(self, original: Tensor) -> Tensor:
        moved = original.to(self.device)
        if not isinstance(original, nn.Parameter) or isinstance(moved, nn.Parameter):
            return moved
        return nn.Parameter(moved, requires_grad=False)


def _all(part: nn.Module) -> list[tuple[nn.Module, str, str, Tensor]]:
    return [entry for module in part.modules() for entry in _entries(module)]


def _entries(module: nn.Module) -> list[tuple[nn.Module, str, str, Tensor]]:
    """(owner, its table, name, tensor) of a module's own parameters and buffers."""
    tables = ("_parameters", "_buffers")
    return [(module, table, name, t) for table in tables for name, t in getattr(module, table).items() if t is not None]


__all__ = ["NEEDS", "STAY", "Phase", "PhaseOffload"]
