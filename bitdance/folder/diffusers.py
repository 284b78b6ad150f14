"""The layout of a diffusers pipeline, with the names of the community port (BiliSakura/BitDance-14B-64x-diffusers).

    model_index.json                     classes of the components
    tokenizer/                           text tokenizer
    text_encoder/                        config.json, generation_config.json, model*.safetensors
    autoencoder/ diffusion_head/ projector/    config.json, diffusion_pytorch_model.safetensors
    pipeline.py, bitdance_diffusers/     thin files that import the installed package `bitdance_diffusers`
    bitdance.json                        ours, as in the published layout

Inside a component tensors have the names of the published files. Nothing here needs diffusers.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance.folder import parts
from bitdance.folder.parts import DIFFUSERS, EXTRAS_FILE, HEAD_CONFIG, LM_CONFIG, TOKENIZER_CONFIG
from lfq_tokenizer.files import links_are_ours, write_text
from lfq_tokenizer.json_file import read_json, write_json

if TYPE_CHECKING:
    from bitdance.folder.source import StoredModel

INDEX = "model_index.json"
DIFFUSERS_VERSION = "0.36.0"  # the first whose names these are
PIPELINE = "BitDanceDiffusionPipeline"
# folders of the components
TEXT, AUTOENCODER, HEAD, PROJECTOR = (DIFFUSERS[p] for p in (parts.BACKBONE, parts.TOKENIZER, parts.HEAD, parts.PROJECTOR))
CLASSES = {AUTOENCODER: "BitDanceAutoencoder", HEAD: "BitDanceDiffusionHead", PROJECTOR: "BitDanceProjector"}
STEMS = {part: f"{name}/{'model' if name == TEXT else 'diffusion_pytorch_model'}" for part, name in DIFFUSERS.items()}
TOKENIZER = "tokenizer"
_CONFIGS = {
    LM_CONFIG: f"{TEXT}/config.json",
    "generation_config.json": f"{TEXT}/generation_config.json",
    TOKENIZER_CONFIG: f"{AUTOENCODER}/config.json",
    HEAD_CONFIG: f"{HEAD}/config.json",
    EXTRAS_FILE: EXTRAS_FILE,
}
_SHIM = '''"""{what} of the package `bitdance`, under the name by which this folder knows it."""

try:
    from {module} import *  # noqa: F403
    from {module} import {name}  # noqa: F401
except ImportError as error:
    raise ImportError(
        "this model needs the package bitdance with diffusers: pip install 'bitdance[diffusers]'"
    ) from error
'''


def place(name: str) -> str:
    """Where a small file of the published layout goes; what no config is belongs to the text tokenizer."""
    return _CONFIGS.get(name, f"{TOKENIZER}/{name}")


def finish(source: "StoredModel", folder: Path) -> None:
    """Write what only this layout has: component configs, model_index.json, the files that name our classes."""
    for part, name in CLASSES.items():
        config = read_json(folder / part / "config.json") if part != PROJECTOR else _projector(source)
        write_json({"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION, **config}, folder / part / "config.json")
    write_json(_index(source), folder / INDEX)
    package = folder / "bitdance_diffusers"
    package.mkdir()
    write_text(_shim("bitdance_diffusers", PIPELINE), folder / "pipeline.py")
    write_text("", package / "__init__.py")
    for part, name in CLASSES.items():
        module = f"modeling_{part}"
        write_text(_shim(f"bitdance_diffusers.{module}", name), package / f"{module}.py")


def _projector(source: "StoredModel") -> dict[str, Any]:
    hidden, bits = source.parts[parts.PROJECTOR]["fc1.weight"].shape
    return {"in_dim": bits, "out_dim": hidden, "hidden_act": "gelu_pytorch_tanh"}


def _index(source: "StoredModel") -> dict[str, Any]:
    architectures = read_json(source.folder / LM_CONFIG).get("architectures") or ["Qwen3ForCausalLM"]
    kind = read_json(source.folder / "tokenizer_config.json").get("tokenizer_class", "")
    extras = source.bitdance_json()
    fast = "Qwen2TokenizerFast" if kind.startswith("Qwen2Tokenizer") else "PreTrainedTokenizerFast"
    return {
        "_class_name": ["pipeline", PIPELINE],
        "_diffusers_version": DIFFUSERS_VERSION,
        **{part: [f"bitdance_diffusers.modeling_{part}", name] for part, name in CLASSES.items()},
        TEXT: ["transformers", architectures[0]],
        TOKENIZER: ["transformers", fast],
        "settings": {key: extras[key] for key in ("defaults", "sizes") if key in extras},
    }


def _shim(module: str, name: str) -> str:
    return _SHIM.format(what=name, module=module, name=name)


_views: list[tempfile.TemporaryDirectory[str]] = []  # they live as long as the process


def is_diffusers(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / INDEX).is_file()


def as_official(folder: Path) -> Path:
    """A diffusers folder seen as a published one: a temporary folder with configs, and links to the weights.

    FileNotFoundError and ValueError name what `folder` lacks or holds of another kind.
    """
    index = read_json(folder / INDEX)
    name = index.get("_class_name") if isinstance(index, dict) else None
    name = name[-1] if isinstance(name, list) and name else name
    if name != PIPELINE:
        raise ValueError(f"{folder / INDEX} describes a {name}; only a {PIPELINE} is read")
    for part in DIFFUSERS.values():
        if not (folder / part / "config.json").is_file():
            raise FileNotFoundError(f"{folder / part / 'config.json'} is missing; a {PIPELINE} folder holds it")
    single = [part for part in STEMS if part != parts.BACKBONE]  # whose weights lie in one file
    for part in single:
        if not (folder / f"{STEMS[part]}.safetensors").is_file():
            raise FileNotFoundError(f"{folder / STEMS[part]}.safetensors is missing; a {PIPELINE} folder holds it, in one file")
    view = tempfile.TemporaryDirectory(prefix="bitdance-")
    target = Path(view.name) / folder.resolve().name
    target.mkdir()
    links_are_ours(target)
    for part in single:
        (target / f"{parts.STEMS[part]}.safetensors").symlink_to((folder / f"{STEMS[part]}.safetensors").resolve())
    for path in sorted((folder / TEXT).iterdir()):
        if path.is_file():
            (target / path.name).symlink_to(path.resolve())
    for path in sorted((folder / TOKENIZER).iterdir()) if (folder / TOKENIZER).is_dir() else []:
        if path.is_file() and not (target / path.name).exists():
            (target / path.name).symlink_to(path.resolve())
    for part, file in ((AUTOENCODER, TOKENIZER_CONFIG), (HEAD, HEAD_CONFIG)):
        config = read_json(folder / part / "config.json")
        write_json({key: value for key, value in config.items() if not key.startswith("_")}, target / file)
    if (folder / EXTRAS_FILE).is_file():
        shutil.copyfile(folder / EXTRAS_FILE, target / EXTRAS_FILE)
    _views.append(view)
    return target
