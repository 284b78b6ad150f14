"""The folder of a class-conditional model, in and out. Every file is checked from its header before anything big is loaded.

bitdance.json                                    {"kind": "class_patch", "defaults": {"guidance_scale", …}}
class_patch.json, class_patch.safetensors        network and head
ae_config.json, ae.safetensors                   picture tokenizer, as in every model folder
classes.json                                     the classes' names, optional
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitdance.folder.parts import EXTRAS_FILE, TOKENIZER_CONFIG, read_extras
from bitdance.sequence.classes import ClassNames
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.settings import choose
from lfq_tokenizer import LFQTokenizer, TokenizerConfig
from lfq_tokenizer.files import check_links, check_room, whole_folder
from lfq_tokenizer.json_file import read_config, write_json
from lfq_tokenizer.tokenizer import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from lfq_tokenizer.weights import check_shapes, read_safetensors, read_shapes, write_safetensors

KIND = "class_patch"
CONFIG, WEIGHTS, CLASSES = "class_patch.json", "class_patch.safetensors", "classes.json"
FILES = (EXTRAS_FILE, CONFIG, WEIGHTS, TOKENIZER_CONFIG, TOKENIZER_WEIGHTS)


@dataclass
class ClassModel:
    """What a folder holds: network, picture tokenizer, names of the classes, and the rest of `bitdance.json`."""

    network: ClassPatchModel
    tokenizer: LFQTokenizer
    names: ClassNames
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that fit the model's training."""
        found: dict[str, Any] = self.extras.get("defaults", {})
        return found

    @property
    def side(self) -> int:
        """Pixels along a side of its pictures."""
        return self.network.config.grid * self.tokenizer.downsampling


@dataclass(frozen=True)
class ClassFolder:
    """What the configs of a folder say; its weights fit them."""

    config: ClassPatchConfig
    tokenizer: TokenizerConfig
    names: ClassNames
    extras: dict[str, Any]

    @property
    def side(self) -> int:
        """Pixels along a side of its pictures."""
        return self.config.grid * self.tokenizer.downsampling


def check_folder(folder: Path) -> ClassFolder:
    """Every file of the folder is there, whole, and fits its config; only headers are read. FileNotFoundError or ValueError name
    the file."""
    check_links(folder)
    config = read_config(folder / CONFIG, ClassPatchConfig.from_dict)
    tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
    if config.latent_dim != tokenizer.bits:
        raise ValueError(
            f"{folder / CONFIG}: latent_dim = {config.latent_dim}, but z_channels = {tokenizer.bits} in "
            f"{TOKENIZER_CONFIG}; must be equal"
        )
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {WEIGHTS: ClassPatchModel(config), TOKENIZER_WEIGHTS: LFQTokenizer(tokenizer)}
    for name, network in networks.items():
        expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        check_shapes(expected, read_shapes(folder / name), folder / name)
    return ClassFolder(config, tokenizer, _names(folder, config.num_classes), _extras(folder))


def load(folder: Path, device: torch.device, dtype: torch.dtype, generation_only: bool = False) -> ClassModel:
    """Read a folder, in eval mode, in `dtype` on `device`. `generation_only` leaves the tokenizer's encoder out."""
    found = check_folder(folder)
    with torch.device("meta"):
        network = ClassPatchModel(found.config)
    network.load_state_dict(read_safetensors(folder / WEIGHTS), strict=True, assign=True)
    tokenizer = LFQTokenizer.from_pretrained(folder)
    if generation_only:
        tokenizer.encoder = None  # type: ignore[assignment]
    network, tokenizer = network.to(device, dtype).eval(), tokenizer.to(device, dtype).eval()
    return ClassModel(network, tokenizer, found.names, found.extras)


def save(model: ClassModel, folder: Path, overwrite: bool = False) -> None:
    """Write the folder: all of it or, when anything fails, nothing. ValueError when it is not empty, unless `overwrite`."""
    if getattr(model.tokenizer, "encoder", None) is None:
        raise ValueError("the model was loaded without its picture encoder; load it with generation_only=False")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ValueError(f"{folder} exists and is not an empty folder; choose another one")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    states = {WEIGHTS: model.network.state_dict(), TOKENIZER_WEIGHTS: model.tokenizer.state_dict()}
    check_room(folder, sum(tensor.nbytes for state in states.values() for tensor in state.values()))
    with whole_folder(folder) as working:
        for name, state in states.items():
            write_safetensors(state, working / name)
        write_json(model.network.config.to_dict(), working / CONFIG)
        write_json(model.tokenizer.config.to_published(), working / TOKENIZER_CONFIG)
        write_json(model.names.to_json(), working / CLASSES)
        write_json({**model.extras, "kind": KIND}, working / EXTRAS_FILE)


def _names(folder: Path, count: int) -> ClassNames:
    path = folder / CLASSES
    if not path.is_file():
        return ClassNames.numbers(count)
    return read_config(path, lambda value: ClassNames.from_json(value, count))


def _extras(folder: Path) -> dict[str, Any]:
    """`bitdance.json`, whose defaults are settings that can be carried out."""
    extras = read_extras(folder)
    if not isinstance(extras.get("defaults", {}), dict):
        raise ValueError(f'{folder / EXTRAS_FILE}: "defaults" is a {type(extras["defaults"]).__name__}; expected an object')
    choose(extras.get("defaults", {}))
    return extras
