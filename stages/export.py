"""Training checkpoint → a folder in the published layout.

A checkpoint holds its (averaged) model in that layout already; exporting verifies the checkpoint, changes the dtype and adds what
is known about the model to `bitdance.json`.
"""

import shutil
from pathlib import Path

import torch

from bitdance.checkpoint import load_model, save_model
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.weights import read_json
from stages import checkpoint
from stages.generator.lora import merged_model


def export_checkpoint(
    path: Path,
    out: Path,
    dtype: str | None = None,
    extras: Path | None = None,
    decoder: Path | None = None,
    base: str | None = None,
) -> None:
    """Write the model of a checkpoint to the new folder `out`. `decoder` names a tokenizer (a run,
    a checkpoint or a folder) whose decoder takes the place of the model's own; its encoder must be the same, tensor for tensor.
    An adapter is merged with its base: `base`, or the run's `generator.init`.

    ValueError if the checkpoint is damaged, `out` is not empty, or the encoders differ.
    """
    folder = checkpoint.newest(path)
    checkpoint.verify(folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another folder")
    number, adapted = getattr(torch, dtype) if dtype else torch.float32, (folder / checkpoint.ADAPTER).is_dir()
    if not adapted and not (folder / "model" / "vision_head_config.json").is_file():
        LFQTokenizer.from_pretrained(folder / "model").to(number).save_pretrained(out)
        return
    model = merged_model(folder, base) if adapted else load_model(folder / "model", device="cpu", dtype=torch.float32)
    if extras is not None:
        known, more = model.extras, read_json(extras)
        card = {**known.get("card", {}), **more.get("card", {})}
        model.extras = {**known, **more, "card": card}
    if decoder is not None:
        assert model.tokenizer is not None
        _take_decoder(model.tokenizer, LFQTokenizer.from_pretrained(checkpoint.model_folder(decoder)).float(), decoder)
    save_model(model, out, dtype=number)


def export_adapter(path: Path, out: Path) -> None:
    """Copy the adapter of a checkpoint to the new folder `out`. ValueError as above, and where the checkpoint has none."""
    folder = checkpoint.newest(path)
    checkpoint.verify(folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another folder")
    if not (folder / checkpoint.ADAPTER).is_dir():
        raise ValueError(f"--adapter: {folder} holds a whole model; adapters come from runs with [generator.lora]")
    shutil.copytree(folder / checkpoint.ADAPTER, out, dirs_exist_ok=True)


def _take_decoder(own: LFQTokenizer, other: LFQTokenizer, place: Path) -> None:
    ours, theirs = own.encoder.state_dict(), other.encoder.state_dict()
    if own.config != other.config or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise ValueError(
            f"--decoder {place}: its encoder is not the one that the model was trained with, so its decoder reads other bits; "
            "train the decoder with tokenizer.freeze_encoder"
        )
    own.decoder.load_state_dict(other.decoder.state_dict())
