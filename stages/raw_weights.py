"""The weights of a checkpoint without averaging, put together from what its processes saved (`resume_state.py`).

Any number of processes and any stage of ZeRO: a parameter is a row of stretches, whoever held them.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bitdance.folder import parts
from bitdance.folder.source import StoredModel
from bitdance.folder.stored import LazyTensor, StoredTensor, open_stored, read_metadata
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.text import listed
from stages.engine.resume_state import read_places

KINDS = ("weight", "frozen", "buffer")
# What the modules of the recipes call the parts. The tokenizer of a generator's run does not train: it stays as model/ has it.
GENERATOR = {parts.BACKBONE: "model.backbone.lm.", parts.HEAD: "model.head.", parts.PROJECTOR: "model.projector."}
TOKENIZER = {parts.TOKENIZER: "tokenizer."}


@dataclass(frozen=True)
class Joined:
    """A parameter in stretches (start, numbers), which together cover it."""

    shape: tuple[int, ...]
    stretches: tuple[tuple[int, StoredTensor], ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.stretches[0][1].dtype

    def read(self, start: int, stop: int) -> Tensor:
        pieces, wanted = [], start
        for first, held in self.stretches:
            last = min(first + held.shape[0], stop)
            if first <= wanted < last:
                pieces.append(held.read(wanted - first, last - first))
                wanted = last
        return torch.cat(pieces)


def take_raw_weights(source: StoredModel, checkpoint: Path) -> None:
    """Let `source`, the model of a checkpoint, hold the weights that its resume state has.

    ValueError lists the first ten parameters that are missing, of another size, or of which a process's part is missing.
    """
    folder = checkpoint / "resume"
    files = sorted(folder.glob("learner_*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no learner_*.safetensors; --weights raw needs the resume state, --weights ema does not")
    stretches: dict[str, list[tuple[int, StoredTensor]]] = {}
    sizes: dict[str, int] = {}
    for path in files:
        places = read_places(read_metadata(path), path)
        for saved, part in open_stored(path).items():
            if saved in places and len(part.shape) != 1:
                raise ValueError(f"{path}: {saved} is no row of numbers but {list(part.shape)}; use --weights ema")
            start, sizes[saved] = places.get(saved, (0, prod(part.shape)))
            stretches.setdefault(saved, []).append((start, part))
    wrong = []
    for of, prefix in (GENERATOR if source.is_pipeline() else TOKENIZER).items():
        found: dict[str, LazyTensor] = {}
        for name, held in source.parts[of].items():
            key = next((key for kind in KINDS if (key := f"{kind}/{prefix}{name}") in stretches), "")
            if not key:
                wrong.append(f"{prefix}{name} is missing")
            elif sizes[key] != prod(held.shape):
                wrong.append(f"{prefix}{name} has {sizes[key]} numbers, model/ {prod(held.shape)}")
            elif (end := _covered(stretches[key])) < sizes[key]:
                wrong.append(f"{prefix}{name} lacks its numbers from {end} on")
            elif key.startswith("buffer/"):
                found[name] = stretches[key][0][1]
            else:
                found[name] = Joined(held.shape, tuple(sorted(stretches[key], key=lambda stretch: stretch[0])))
        source.parts[of] = found
    if wrong:
        state = folder / "state.json"
        said = read_json(state) if state.is_file() else {}
        count = said.get("processes", "?") if isinstance(said, dict) else "?"
        raise ValueError(
            f"{folder} (files of {len(files)} processes; the run had {count}) does not hold the whole model: {listed(wrong)}. "
            "Restore the files, or use --weights ema."
        )


def _covered(stretches: list[tuple[int, StoredTensor]]) -> int:
    """How many numbers from the first on are there without a gap."""
    end = 0
    for start, held in sorted(stretches, key=lambda stretch: stretch[0]):
        if start > end:
            break
        end = max(end, start + prod(held.shape))
    return end
