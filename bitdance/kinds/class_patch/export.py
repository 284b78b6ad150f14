"""A model folder of classes → another one, in another dtype or with further facts in its `bitdance.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitdance.folder.stored import open_stored
from bitdance.kinds.class_patch.folder import WEIGHTS, load, save
from lfq_tokenizer.text import listed
from lfq_tokenizer.tokenizer import WEIGHTS_FILE as TOKENIZER_WEIGHTS


def export(folder: Path, out: Path, dtype: torch.dtype | None, extras: Mapping[str, Any]) -> None:
    """Write the new folder `out`, whole or not at all. `dtype=None` keeps those of the two files. ValueError when `out` is not
    empty, or a number is NaN or infinite (also when only `dtype` makes it so)."""
    own = {name: next(iter(open_stored(folder / name).values())).dtype for name in (WEIGHTS, TOKENIZER_WEIGHTS)}
    model = load(folder, torch.device("cpu"), dtype or own[WEIGHTS])
    model.tokenizer.to(dtype or own[TOKENIZER_WEIGHTS])
    tensors = {**model.network.state_dict(), **model.tokenizer.state_dict()}
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(
            f"{folder}: {listed(broken, ', ')} hold NaN or infinity{' in that dtype' if dtype else ''}; nothing was written"
        )
    model.extras = {**model.extras, **extras}
    save(model, out)
