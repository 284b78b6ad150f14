"""The published folder layout, in and out. Every file is checked from its header before anything big is loaded.

    config.json, generation_config.json, tokenizer files, model*.safetensors     backbone, as transformers writes it
    ae_config.json, ae.safetensors                                               tokenizer
    vision_head_config.json, vision_head.safetensors                             head
    projector.safetensors                                                        projector
    bitdance.json     ours, optional: defaults, sizes, prompts, card

Source: published checkpoints; `bitdance.json` is absent there.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from bitdance.backbone import Backbone
from bitdance.foreign import build_config, load_text_tokenizer
from bitdance.formats.diffusers import as_official, is_diffusers
from bitdance.head import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.projector import Projector
from bitdance.prompt import SpecialTokens, save_text_tokenizer, vision_prefix_ids
from bitdance.quantize import check_kinds, quantize_model
from bitdance.sampling import choose
from bitdance.sizes import EXTRAS_FILE, HEAD_CONFIG, TOKENIZER_CONFIG, read_extras, rule_of_folder
from bitdance.values import shown
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.files import check_links, check_room, whole_folder
from lfq_tokenizer.json_file import read_config, read_json, write_json
from lfq_tokenizer.weights import check_depth, check_shapes, read_safetensors, read_shapes, read_weight_map, write_safetensors

if TYPE_CHECKING:
    from bitdance.adapters import Adapter

KIND = "next_patch"  # of a folder whose bitdance.json names none
TOKENIZER_WEIGHTS = "ae.safetensors"
HEAD_WEIGHTS = "vision_head.safetensors"
PROJECTOR_WEIGHTS = "projector.safetensors"
LM_CONFIG, LM_WEIGHTS, LM_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DEMO = Path(__file__).parent / "pretrained" / "demo"
Module = TypeVar("Module", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]


def resolve(folder: Path | str) -> Path:
    """The folder a user means, in the published layout; "demo" is the bundled model, and of a diffusers folder it is a view in
    that layout. FileNotFoundError says what was looked for."""
    path = DEMO if str(folder) == "demo" else Path(folder)
    if not path.is_dir():
        files = ", ".join((LM_CONFIG, TOKENIZER_CONFIG, HEAD_CONFIG, PROJECTOR_WEIGHTS))
        raise FileNotFoundError(
            f"no model folder {str(folder)!r} (looked for {path.absolute()}); a model is a local folder with "
            f'{files} and their weights. "demo" names the bundled model.'
        )
    check_links(path)
    return as_official(path) if is_diffusers(path) else path


def load_model(
    folder: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generation_only: bool = False,
    quantize: str | None = None,
    quantize_head: str | None = None,
    lora: Path | str | None = None,
    lora_scale: float = 1.0,
) -> BitDanceModel:
    """Read a model folder (or "demo"). `device=None` is CUDA where there is one, else CPU; `dtype=None` is bfloat16 on
    CUDA and float32 elsewhere, whatever the dtype on disk. `generation_only` leaves out what pictures do not need: the
    tokenizer's encoder and the LLM's text output (`lm_head`), which is neither read nor allocated. Such a model cannot be saved.
    `quantize` ("int8", "int4") and `quantize_head` ("int8", "fp8") keep the large matrices of LLM and head in 8 or 4 bits
    (`bitdance.quantize`), made one by one on `device`. `lora` is the folder of an adapter that is added to the weights first,
    `lora_scale` times (`bitdance.adapters`).

    The model comes back in eval mode; `model.extras` is the content of `bitdance.json`, {} where there is none.
    FileNotFoundError or ValueError name the file and the first ten tensors that are missing or of a wrong shape; they
    come before anything big is read.
    """
    folder = resolve(folder)
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype}; a model computes in float32, bfloat16 or float16")
    check_kinds(quantize, quantize_head, target)
    config = check_folder(folder)
    adapter = None if lora is None else _adapter(lora, lora_scale, folder)
    text_tokenizer = _load_text_tokenizer(folder, config)
    tokenizer = LFQTokenizer.from_pretrained(folder)
    if generation_only:
        tokenizer.encoder = None  # type: ignore[assignment]
    head = _load(lambda: BinaryDiffusionHead(config), folder / HEAD_WEIGHTS)
    projector = _load(lambda: Projector(config.ch_target, config.ch_cond), folder / PROJECTOR_WEIGHTS)
    # weights that will be quantised stay in the file's dtype till then: mapped from the file, they take no memory of their own
    kept = None if quantize or adapter else dtype  # an adapter is added before anything is rounded
    backbone = Backbone.from_pretrained(folder, kept, output_head=not generation_only)
    model = BitDanceModel(tokenizer, text_tokenizer, projector, backbone, head)
    model.extras, model.folder = read_extras(folder), folder
    if adapter is not None:
        adapter.add_to(model, dtype)
    if quantize or quantize_head:
        quantize_model(model, quantize, quantize_head, target, dtype)
    return model.to(device=target, dtype=dtype).eval()


def _adapter(lora: Path | str, scale: float, folder: Path) -> "Adapter":
    from bitdance.adapters import Adapter  # which tells models by their files, as this module knows them

    adapter = Adapter.read(lora, scale)
    adapter.check_base(folder)
    return adapter


def check_folder(folder: Path) -> HeadConfig:
    """Every file of a model folder is there, whole, and fits its config; only headers are read. Returns the head's
    config."""
    if (kind := read_extras(folder).get("kind", KIND)) != KIND:
        raise ValueError(f"{folder} holds a model of kind {shown(kind)}, not {KIND!r}; bitdance.load_pipeline reads every kind")
    config = read_config(folder / HEAD_CONFIG, HeadConfig.from_dict)
    tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
    lm = read_config(folder / LM_CONFIG, dict)
    built = read_config(folder / LM_CONFIG, build_config)
    for name, value, file, other, expected in (
        ("ch_target", config.ch_target, TOKENIZER_CONFIG, "z_channels", tokenizer.z_channels),
        ("ch_cond", config.ch_cond, LM_CONFIG, "hidden_size", lm.get("hidden_size")),
    ):
        if value != expected:
            raise ValueError(f"{folder / HEAD_CONFIG}: {name} = {value}, but {other} = {expected} in {file}; must be equal")
    _check_weights(lambda: LFQTokenizer(tokenizer), folder / TOKENIZER_WEIGHTS, tokenizer.layers)
    _check_weights(lambda: BinaryDiffusionHead(config), folder / HEAD_WEIGHTS, config.depth_latent)
    _check_weights(lambda: Projector(config.ch_target, config.ch_cond), folder / PROJECTOR_WEIGHTS)
    found = _lm_shapes(folder)
    # Other families may be stored under other names than in memory; there transformers checks while loading.
    if lm.get("model_type") == "qwen3":
        check_depth(built.num_hidden_layers, found, folder / "model*.safetensors")
        backbone = _on_meta(lambda: read_config(folder / LM_CONFIG, Backbone.from_config))
        shapes = _shapes(backbone.lm)
        if lm.get("tie_word_embeddings") and "lm_head.weight" not in found:
            del shapes["lm_head.weight"]
        check_shapes(shapes, found, folder / "model*.safetensors")
    rule_of_folder(folder)
    try:
        choose(read_extras(folder).get("defaults", {}))
    except ValueError as error:
        raise ValueError(f"{folder / EXTRAS_FILE}: {error}") from None
    return config


def save_model(model: BitDanceModel, folder: Path | str, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Write the published layout: all of it or, when anything fails, nothing. `dtype=None` keeps each tensor's own.

    ValueError when the folder holds something already (unless `overwrite`), when the disk is too small, or when the
    model was loaded for generation only or quantised.
    """
    folder, tokenizer = Path(folder), model.tokenizer
    if getattr(model, "quantized", {}):
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
    if extras := getattr(model, "extras", None):
        write_json(extras, folder / EXTRAS_FILE)


def _cast_lm(folder: Path, dtype: torch.dtype) -> None:
    """Bring the backbone's files to `dtype`, file by file, without touching the model in memory."""
    for path in sorted(folder.glob("model*.safetensors")):
        write_safetensors({name: t.to(dtype) for name, t in read_safetensors(path).items()}, path)
    if (folder / LM_INDEX).is_file():
        index = read_json(folder / LM_INDEX)
        size = sum(math.prod(shape) for shape in _lm_shapes(folder).values()) * dtype.itemsize
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
    module = _on_meta(build)
    module.load_state_dict(read_safetensors(path), strict=True, assign=True)
    return module


def _check_weights(build: Callable[[], nn.Module], path: Path, layers: int = 1) -> None:
    found = read_shapes(path)
    check_depth(layers, found, path)
    check_shapes(_shapes(_on_meta(build)), found, path)


def _lm_shapes(folder: Path) -> Shapes:
    """Name → shape over all files of the backbone. An index may only name files of its own folder."""
    if (folder / LM_WEIGHTS).is_file() or not (folder / LM_INDEX).is_file():
        return read_shapes(folder / LM_WEIGHTS)
    shapes: Shapes = {}
    for name in sorted(set(read_weight_map(folder / LM_INDEX).values())):
        shapes |= read_shapes(folder / name)
    return shapes


def _on_meta(build: Callable[[], Module]) -> Module:
    with torch.device("meta"):
        return build()


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}
