"""Models that have one network of their own beside the picture tokenizer: what their folders hold, in and out.

bitdance.json                         {"kind": KIND, "defaults": {…}}
KIND.json, KIND.safetensors           the network
ae_config.json, ae.safetensors        the picture tokenizer, as in every model folder
classes.json                          of a model of classes: their names, optional
text_encoder/                         of a model of prompts: a folder as transformers keeps it

A kind says in a `Layout` what its network is; every file is checked from its header before anything big is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from bitdance.folder.fingerprint import fingerprint_of
from bitdance.folder.parts import (
    BACKBONE,
    EXTRAS_FILE,
    STEMS,
    TOKENIZER_CONFIG,
    TOKENIZER_WEIGHTS,
    count_parameters,
    read_extras,
    weight_files,
)
from bitdance.folder.stored import open_stored, stored_tensors
from bitdance.networks.text_encoder import TextEncoder, width_of
from bitdance.sequence.classes import ClassNames
from lfq_tokenizer.any_tokenizer import PictureTokenizerConfig, build_tokenizer, config_of, load_tokenizer
from lfq_tokenizer.files import check_links, check_room, whole_folder
from lfq_tokenizer.json_file import read_config, write_json
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import check_shapes, read_safetensors, read_shapes, write_safetensors

CLASSES, TEXT_ENCODER = "classes.json", "text_encoder"
NETWORK, TOKENIZER = "generator", "tokenizer"  # the parts, as `info` and `verify` call them


class NetworkConfig(Protocol):
    """What the shared rooms ask of the config of such a network."""

    @property
    def bits(self) -> int: ...  # per token

    @property
    def token(self) -> str: ...  # what a token is, as the tokenizer's config says it

    @property
    def grids(self) -> tuple[tuple[int, int], ...]: ...  # (height, width) in tokens that it makes, the first by default

    @property
    def class_count(self) -> int | None: ...  # None: it makes pictures of prompts

    @property
    def text_width(self) -> int | None: ...  # features of a text token that it reads

    @property
    def known(self) -> tuple[str, int] | None: ...  # name and parameters of the published model that it describes

    @property
    def decides(self) -> dict[str, Any]: ...  # what decides pictures and does not show in the shapes of the weights

    def to_dict(self) -> dict[str, Any]: ...


Config = TypeVar("Config", bound=NetworkConfig)


def check_new(folder: Path) -> None:
    """ValueError where something lies there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another one")


@dataclass
class PictureModel:
    """What a folder holds: network, picture tokenizer, names of the classes or the text encoder, and the rest of
    `bitdance.json`."""

    network: Any
    tokenizer: Any  # a picture tokenizer of whichever architecture
    names: ClassNames | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    text: TextEncoder | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that fit the model's training."""
        found: dict[str, Any] = self.extras.get("defaults", {})
        return found

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of what it makes, the first by default."""
        s = self.tokenizer.downsampling
        return [(h * s, w * s) for h, w in self.network.config.grids]


@dataclass(frozen=True)
class FolderFacts(Generic[Config]):
    """What the configs of a folder say; its weights fit them."""

    config: Config
    tokenizer: PictureTokenizerConfig
    names: ClassNames | None
    extras: dict[str, Any]
    text_parameters: int = 0  # of the text encoder

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of what it makes, the first by default."""
        s = self.tokenizer.downsampling
        return [(h * s, w * s) for h, w in self.config.grids]


@dataclass(frozen=True)
class Layout(Generic[Config]):
    """How a kind keeps its models. `config_of` makes a config of a JSON object; `build` a network of a config, with fresh
    weights; `choose` settings of the defaults in `bitdance.json`. All three raise ValueError for what does not fit."""

    kind: str
    config_of: Callable[[Any], Config]
    build: Callable[..., nn.Module]
    choose: Callable[[Mapping[str, Any]], Any]

    @property
    def config_file(self) -> str:
        """The network's config."""
        return f"{self.kind}.json"

    @property
    def weights_file(self) -> str:
        """The network's weights."""
        return f"{self.kind}.safetensors"

    @property
    def files(self) -> dict[str, str]:
        """Part → its weight file."""
        return {NETWORK: self.weights_file, TOKENIZER: TOKENIZER_WEIGHTS}

    def check(self, folder: Path) -> FolderFacts[Config]:
        """Every file of the folder is there, whole, and fits its config; only headers are read. FileNotFoundError or ValueError
        name the file."""
        check_links(folder)
        config = read_config(folder / self.config_file, self.config_of)
        tokenizer = read_config(folder / TOKENIZER_CONFIG, config_of)
        if config.token != tokenizer.token:
            raise ValueError(
                f"{folder / self.config_file}: tokens of {config.token}, but of {tokenizer.token} in {TOKENIZER_CONFIG}; must be "
                "equal"
            )
        with torch.device("meta"):
            networks = {self.weights_file: self.build(config), TOKENIZER_WEIGHTS: build_tokenizer(tokenizer)}
        for name, network in networks.items():
            expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
            check_shapes(expected, read_shapes(folder / name), folder / name)
        text_parameters = 0
        if config.text_width is not None:
            if (width := width_of(folder / TEXT_ENCODER)) != config.text_width:
                raise ValueError(
                    f"{folder / TEXT_ENCODER} gives {width} features per token, {self.config_file} reads {config.text_width}; "
                    "must be equal"
                )
            text_parameters = sum(map(count_parameters, weight_files(folder / TEXT_ENCODER, STEMS[BACKBONE])))
        return FolderFacts(config, tokenizer, self._names(folder, config.class_count), self._extras(folder), text_parameters)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype, generation_only: bool = False) -> PictureModel:
        """Read a folder, in eval mode, in `dtype` on `device`. `generation_only` leaves the picture encoder out."""
        found = self.check(folder)
        with torch.device("meta"):
            network = self.build(found.config)
        network.load_state_dict(read_safetensors(folder / self.weights_file), strict=True, assign=True)
        tokenizer = load_tokenizer(folder)
        if generation_only:
            tokenizer.encoder = None  # type: ignore[assignment]
        text = None
        if found.config.text_width is not None:
            prefix = found.extras.get("prompt_prefix", "")
            text = TextEncoder.from_pretrained(folder / TEXT_ENCODER, dtype, prefix).to(device)
        network, tokenizer = network.to(device, dtype).eval(), tokenizer.to(device, dtype).eval()
        return PictureModel(network, tokenizer, found.names, found.extras, text)

    def save(self, model: PictureModel, folder: Path, overwrite: bool = False) -> None:
        """Write the folder: all of it or, when anything fails, nothing. ValueError when it is not empty, unless `overwrite`."""
        if getattr(model.tokenizer, "encoder", None) is None:
            raise ValueError("the model was loaded without its picture encoder; load it with generation_only=False")
        if not overwrite:
            check_new(folder)
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        states = {self.weights_file: model.network.state_dict(), TOKENIZER_WEIGHTS: model.tokenizer.state_dict()}
        check_room(folder, sum(tensor.nbytes for state in states.values() for tensor in state.values()))
        with whole_folder(folder) as working:
            for name, state in states.items():
                write_safetensors(state, working / name)
            write_json(model.network.config.to_dict(), working / self.config_file)
            write_json(model.tokenizer.config.to_published(), working / TOKENIZER_CONFIG)
            if model.names is not None:
                write_json(model.names.to_json(), working / CLASSES)
            if model.text is not None:
                model.text.save_pretrained(working / TEXT_ENCODER)
            write_json({**model.extras, "kind": self.kind}, working / EXTRAS_FILE)

    def export(self, folder: Path, out: Path, dtype: torch.dtype | None, extras: Mapping[str, Any]) -> None:
        """A model folder → another one, in another dtype or with further facts in its `bitdance.json`; whole or not at all.

        `dtype=None` keeps those of the two files. ValueError when `out` is not empty, or a number is NaN or infinite (also when
        only `dtype` makes it so)."""
        own = {part: next(iter(open_stored(folder / name).values())).dtype for part, name in self.files.items()}
        model = self.load(folder, torch.device("cpu"), dtype or own[NETWORK])
        model.tokenizer.to(dtype or own[TOKENIZER])
        tensors = {**model.network.state_dict(), **model.tokenizer.state_dict()}
        if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
            raise ValueError(
                f"{folder}: {listed(broken, ', ')} hold NaN or infinity{' in that dtype' if dtype else ''}; nothing was written"
            )
        model.extras = {**model.extras, **extras}
        self.save(model, out)

    def fingerprint(self, folder: Path) -> str:
        """16 hex digits of the weights and of what else decides pictures; names of classes and settings of training do not
        count."""
        tensors = {part: open_stored(folder / file) for part, file in self.files.items()}
        config = read_config(folder / self.config_file, self.config_of)
        if config.text_width is not None:
            tensors[TEXT_ENCODER] = stored_tensors(folder / TEXT_ENCODER, STEMS[BACKBONE])
        tokenizer = read_config(folder / TOKENIZER_CONFIG, config_of)
        return fingerprint_of(tensors, {**config.decides, TOKENIZER: tokenizer.to_published()})

    @staticmethod
    def _names(folder: Path, count: int | None) -> ClassNames | None:
        path = folder / CLASSES
        if count is None:
            return None
        if not path.is_file():
            return ClassNames.numbers(count)
        return read_config(path, lambda value: ClassNames.from_json(value, count))

    def _extras(self, folder: Path) -> dict[str, Any]:
        """`bitdance.json`, whose defaults are settings that can be carried out."""
        extras = read_extras(folder)
        if not isinstance(extras.get("defaults", {}), dict):
            raise ValueError(f'{folder / EXTRAS_FILE}: "defaults" is a {type(extras["defaults"]).__name__}; expected an object')
        if not isinstance(prefix := extras.get("prompt_prefix", ""), str):
            raise ValueError(f'{folder / EXTRAS_FILE}: "prompt_prefix" is a {type(prefix).__name__}; expected text')
        self.choose(extras.get("defaults", {}))
        return extras
