"""Training checkpoint or model folder → a model folder in a layout of `bitdance.folder`.

Tensors are streamed from file to file; only the merging of an adapter holds a whole model.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from bitdance.folder.checkpoint import save_model
from bitdance.folder.config import resolve
from bitdance.folder.conversion import EXPORT_DTYPES, convert
from bitdance.folder.parts import TOKENIZER, read_extras
from bitdance.folder.source import StoredModel
from bitdance.folder.stored import pieces
from bitdance.generator import kind_of, module_of
from lfq_tokenizer.files import check_room, clear_leftovers, fsync, temporary_beside, whole_folder
from lfq_tokenizer.json_file import read_json
from stages.engine import checkpoint
from stages.engine.run_folder import naming_full
from stages.raw_weights import take_raw_weights

Weights = Literal["ema", "raw"]


def export_checkpoint(
    path: Path,
    out: Path,
    dtype: str | None = None,
    extras: Path | None = None,
    decoder: Path | None = None,
    base: str | None = None,
    format: str = "official",
    weights: Weights = "ema",
) -> None:
    """Write a model to the new folder `out`: of a checkpoint, of a run's newest one, or of a model folder in any layout.

    `weights`: "ema" is the average that a checkpoint's model/ holds, "raw" what its processes trained, put together from
    resume/. `decoder` names a tokenizer (a run, a checkpoint or a folder) whose decoder takes the place of the model's own; its
    encoder must be the same, tensor for tensor. An adapter is merged with its base: `base`, or the run's `generator.init`.

    ValueError or FileNotFoundError if the source is damaged or lacks something, `out` is not empty, the encoders differ, a number
    is not finite, or the disk is too small; they come before `out` exists.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder")
    number = EXPORT_DTYPES[dtype] if dtype else None
    if (folder := _folder(path)) and (own := getattr(module_of(folder), "export", None)):
        others = {"--format": format != "official", "--decoder": decoder, "--weights": weights != "ema", "--base": base}
        for flag, given in others.items():
            if given:
                raise ValueError(f"{flag} is not for a model of this kind ({kind_of(folder)}); leave it out")
        if folder != path:
            checkpoint.verify(folder.parent)
        own(folder, out, number, _extras(extras, read_extras(folder)))
        return
    with _opened(path, out, weights, base) as source:
        if weights == "raw" and number is None:
            number = torch.float32  # as resume/ has them, whatever model/ says
        if extras is not None:
            source.extras = _extras(extras, source.bitdance_json())
        if decoder is not None:
            _take_decoder(source, StoredModel.open(checkpoint.model_folder(decoder)), decoder)
        convert(source, out, format, number)


def _folder(path: Path) -> Path | None:
    """The model folder that is exported; None where there is none yet: an adapter, or what is an error later."""
    saved = (path / "manifest.json").is_file() or any(path.glob("step_*"))
    folder = checkpoint.newest(path) / "model" if saved else path
    return folder if folder.is_dir() else None


def _extras(path: Path | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder's `bitdance.json` knows, with what the file of `--extras` adds. ValueError names the file."""
    more = {} if path is None else read_json(path)
    if not isinstance(more, dict) or not isinstance(more.get("card", {}), dict):
        raise ValueError(f"--extras {path}: a JSON object is allowed, with an object `card` in it if any")
    card = {**known.get("card", {}), **more.get("card", {})}
    return {**known, **more, **({"card": card} if card else {})}


@contextmanager
def _opened(path: Path, out: Path, weights: Weights, base: str | None) -> Iterator[StoredModel]:
    saved = (path / "manifest.json").is_file() or any(path.glob("step_*"))
    if not saved:
        if weights == "raw":
            raise ValueError(f"--weights raw: {path} is no checkpoint; a model folder has one set of weights")
        yield StoredModel.open(_model(path))
        return
    folder = checkpoint.newest(path)
    step = checkpoint.verify(folder)
    manifest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    origin = {"kind": "checkpoint", "step": step, "weights": weights, "manifest_sha256": manifest}
    if not (folder / checkpoint.ADAPTER).is_dir():
        source = StoredModel.open(folder / "model")
        source.origin = origin
        if weights == "raw":
            take_raw_weights(source, folder)
        yield source
        return
    if weights == "raw":
        raise ValueError("--weights raw: a checkpoint of [generator.lora] is merged as its adapter/ has it")
    from stages.recipes.generator.lora import merged_model

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out.absolute().parent, out.name)
    merged = temporary_beside(out.absolute())
    try:
        save_model(merged_model(folder, base), merged)
        source = StoredModel.open(merged)
        source.origin = {**origin, "kind": "adapter, merged"}
        yield source
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _model(path: Path) -> Path:
    try:
        return resolve(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is neither a checkpoint, nor a run with one, nor a model folder ({error})") from None


def export_adapter(path: Path, out: Path) -> None:
    """Copy the adapter of a checkpoint to the new folder `out`. ValueError as above, and where the checkpoint has none."""
    folder = checkpoint.newest(path)
    checkpoint.verify(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder")
    if not (folder / checkpoint.ADAPTER).is_dir():
        raise ValueError(f"--adapter: {folder} holds a whole model; adapters come from runs with [generator.lora]")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    source = folder / checkpoint.ADAPTER
    check_room(out, sum(path.stat().st_size for path in source.iterdir()))
    with naming_full(out), whole_folder(out) as whole:
        for path in source.iterdir():
            shutil.copyfile(path, whole / path.name)  # permissions are those of a new file
            fsync(whole / path.name)


def _take_decoder(source: StoredModel, other: StoredModel, place: Path) -> None:
    own, theirs = source.parts[TOKENIZER], other.parts[TOKENIZER]
    shapes = [{name: held.shape for name, held in tensors.items()} for tensors in (own, theirs)]
    encoder = [name for name in own if name.startswith("encoder.")]
    if shapes[0] != shapes[1] or not all(
        torch.equal(a.float(), b.float())
        for name in encoder
        for a, b in zip(pieces(own[name]), pieces(theirs[name]), strict=True)
    ):
        raise ValueError(
            f"--decoder {place}: its encoder is not the one that the model was trained with, so its decoder reads other bits; "
            "train the decoder with tokenizer.freeze_encoder"
        )
    source.parts[TOKENIZER] = {**own, **{name: held for name, held in theirs.items() if name.startswith("decoder.")}}
