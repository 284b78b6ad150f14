"""A model folder in the published layout → a model, and back. Nothing big is loaded before every file was checked.

What lies in a folder, and its check: `bitdance.folder.config`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bitdance.folder.adapters import Adapter
from bitdance.folder.config import ModelConfig, check_folder, on_meta, resolve
from bitdance.folder.parts import (
    BACKBONE,
    EXTRAS_FILE,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    LM_CONFIG,
    LM_INDEX,
    PROJECTOR_WEIGHTS,
    TOKENIZER_CONFIG,
    TOKENIZER_WEIGHTS,
    count_parameters,
    part_files,
)
from bitdance.foreign import load_text_tokenizer
from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.networks.quantize import check_quantization, quantize_model
from bitdance.sequence.prompt import SpecialTokens, save_text_tokenizer, vision_prefix_ids
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.files import check_room, whole_folder
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors, write_safetensors

Module = TypeVar("Module", bound=nn.Module)


def load_model(
    folder: Path | str | ModelConfig,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generation_only: bool = False,
    quantize: str | None = None,
    quantize_head: str | None = None,
    lora: Path | str | None = None,
    lora_scale: float = 1.0,
) -> BitDanceModel:
    """Read a model folder (or "demo", or one that has been checked, by its config). `device=None` is CUDA where there is one,
    else CPU; `dtype=None` is bfloat16 on CUDA and float32 elsewhere, whatever the dtype on disk. `generation_only` leaves out
    what pictures do not need: the tokenizer's encoder and the LLM's text output (`lm_head`), which is neither read nor
    allocated. Such a model cannot be saved. `quantize` ("int8", "int4") and `quantize_head` ("int8", "fp8") keep the large
    matrices of LLM and head in 8 or 4 bits (`bitdance.networks.quantize`), made one by one on `device`. `lora` is the folder of
    an adapter that is added to the weights first, `lora_scale` times (`bitdance.folder.adapters`).

    The model comes back in eval mode; `model.extras` is the content of `bitdance.json`, {} where there is none.
    FileNotFoundError or ValueError name the file and the first ten tensors that are missing or of a wrong shape; they
    come before anything big is read.
    """
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype}; a model computes in float32, bfloat16 or float16")
    check_quantization(quantize, quantize_head, target)
    config = folder if isinstance(folder, ModelConfig) else check_folder(resolve(folder))
    assert config.folder is not None
    folder, adapter = config.folder, None
    if lora is not None:
        adapter = Adapter.read(lora, lora_scale)
        adapter.check_base(folder)
    text_tokenizer = _load_text_tokenizer(folder, config.head)
    tokenizer = LFQTokenizer.from_pretrained(folder)
    if generation_only:
        tokenizer.encoder = None  # type: ignore[assignment]
    head = _load(lambda: BinaryDiffusionHead(config.head), folder / HEAD_WEIGHTS)
    projector = _load(lambda: Projector(config.head.ch_target, config.head.ch_cond), folder / PROJECTOR_WEIGHTS)
    # weights that will be quantised stay in the file's dtype till then: mapped from the file, they take no memory of their own
    kept = None if quantize or adapter else dtype  # an adapter is added before anything is rounded
    backbone = Backbone.from_pretrained(folder, kept, output_head=not generation_only)
    model = BitDanceModel(tokenizer, text_tokenizer, projector, backbone, head, dict(config.extras), folder)
    if adapter is not None:
        adapter.add_to(model, dtype)
    if quantize or quantize_head:
        quantize_model(model, quantize, quantize_head, target, dtype)
    return model.to(device=target, dtype=dtype).eval()


def save_model(model: BitDanceModel, folder: Path | str, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Write the published layout: all of it or, when anything fails, nothing. `dtype=None` keeps each tensor's own.

    ValueError when the folder holds something already (unless `overwrite`), when the disk is too small, or when the
    model was loaded for generation only or quantised.
    """
    folder, tokenizer = Path(folder), model.tokenizer
    if model.quantized:
        raise ValueError("quantised weights are not saved; load the model without quantize and quantize_head to write its folder")
    if tokenizer is None or tokenizer.encoder is None or not model.backbone.has_output_head:
        raise ValueError(
            "the model lacks its picture encoder or text output, so it cannot be saved; load it with generation_only=False"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ValueError(f"{folder} exists and is not empty; choose another folder or pass overwrite=True")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    modules: tuple[nn.Module, ...] = (tokenizer, model.projector, model.backbone.lm, model.head)
    tensors = [t for module in modules for t in module.state_dict().values()]
    needed = sum(t.numel() * max(t.element_size(), dtype.itemsize if dtype else 0) for t in tensors)
    check_room(folder, needed)
    with whole_folder(folder) as temporary:
        _write(model, tokenizer, temporary, dtype)


def _write(model: BitDanceModel, tokenizer: LFQTokenizer, folder: Path, dtype: torch.dtype | None) -> None:
    save_text_tokenizer(model.text_tokenizer, folder)
    model.backbone.save_pretrained(folder)
    write_json(tokenizer.config.to_published(), folder / TOKENIZER_CONFIG)
    write_json(model.head.config.to_dict(), folder / HEAD_CONFIG)
    files: list[tuple[nn.Module, str]] = [
        (tokenizer, TOKENIZER_WEIGHTS),
        (model.head, HEAD_WEIGHTS),
        (model.projector, PROJECTOR_WEIGHTS),
    ]
    for module, name in files:
        write_safetensors({k: v if dtype is None else v.to(dtype) for k, v in module.state_dict().items()}, folder / name)
    if dtype is not None:
        _cast_lm(folder, dtype)
    if model.extras:
        write_json(model.extras, folder / EXTRAS_FILE)


def _cast_lm(folder: Path, dtype: torch.dtype) -> None:
    """Bring the backbone's files to `dtype`, file by file, without touching the model in memory."""
    for path in sorted(folder.glob("model*.safetensors")):
        write_safetensors({name: t.to(dtype) for name, t in read_safetensors(path).items()}, path)
    if (folder / LM_INDEX).is_file():
        index = read_json(folder / LM_INDEX)
        size = sum(map(count_parameters, part_files(folder)[BACKBONE])) * dtype.itemsize
        write_json({**index, "metadata": {**index.get("metadata", {}), "total_size": size}}, folder / LM_INDEX)
    config = read_json(folder / LM_CONFIG)
    write_json({**config, "dtype": str(dtype).removeprefix("torch.")}, folder / LM_CONFIG)


def _load_text_tokenizer(folder: Path, head: HeadConfig) -> Any:
    tokenizer = load_text_tokenizer(folder)
    try:
        vision_prefix_ids(SpecialTokens.from_tokenizer(tokenizer), 1, 1, head.parallel_num)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    rows = read_json(folder / LM_CONFIG).get("vocab_size", 0)
    if rows < (most := max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))):
        raise ValueError(
            f"{folder}: the text tokenizer has {most} tokens, the backbone's embedding only {rows} rows; "
            "tokenizer files and weights must come from the same model"
        )
    return tokenizer


def _load(build: Callable[[], Module], path: Path) -> Module:
    module = on_meta(build)
    module.load_state_dict(read_safetensors(path), strict=True, assign=True)
    return module
