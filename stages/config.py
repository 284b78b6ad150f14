"""Training configs: frozen dataclasses as schema, TOML as values.

    extends = "base.toml"          one level, relative to the file
    recipe = "tokenizer"           or "generator"
    [run] [data] [optimizer] [deepspeed] [tokenizer] [generator]

`--set run.steps=10` changes one value; values are read as TOML, and a word that is not TOML is a string. Unknown keys are errors.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfq_tokenizer import TokenizerConfig


@dataclass(frozen=True)
class RunConfig:
    """Length and rhythm. Steps are optimiser steps; `out` is the run's folder."""

    out: str = ""
    steps: int = 1000
    batch_size: int = 32  # samples per process and micro-step
    accumulation: int = 1  # micro-steps per optimiser step
    seed: int = 0
    ema: float = 0.999  # decay of the averaged weights; 0 switches averaging off
    precision: str = "float32"  # or "bfloat16": float32 weights, bfloat16 autocast
    compile: bool = False
    log_every: int = 20
    validate_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"run.precision = {self.precision!r}; allowed are 'float32' and 'bfloat16'")
        for name in ("steps", "batch_size", "accumulation", "log_every", "validate_every", "sample_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} = {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"run.ema = {self.ema}; it must be in [0, 1)")


@dataclass(frozen=True)
class DataConfig:
    """Shards: paths or globs of webdataset tars. Relative paths are relative to where the command runs."""

    train: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    mirror: bool = False  # random left-right flips (tokenizer only)
    crop: int = 0  # random square crops of this side, one place per batch; 0: whole pictures (tokenizer only)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `schedule` is 'constant' or 'cosine' (down to `final_fraction` of lr), both after a linear warm-up."""

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    warmup_steps: int = 2000
    schedule: str = "constant"
    final_fraction: float = 0.0
    clip: float = 1.0  # gradient norm; 0 switches clipping off

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule = {self.schedule!r}; allowed are 'constant' and 'cosine'")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What is handed to DeepSpeed beside batch size, clipping and precision."""

    zero_stage: int = 0

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(f"deepspeed.zero_stage = {self.zero_stage}; allowed are 0, 1 and 2 (3 is not supported yet)")


@dataclass(frozen=True)
class AdversaryTraining:
    """The discriminator of recipe 'tokenizer'. It begins to train, and to be deceived, at step `start`."""

    weight: float = 0.0  # of deceiving it, in the tokenizer's loss (published: 0.1); 0: there is no discriminator
    start: int = 0
    lecam_weight: float = 0.05
    lecam_decay: float = 0.999
    ch: int = 64
    layers: int = 3
    lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)

    def __post_init__(self) -> None:
        if self.weight < 0 or self.lecam_weight < 0 or self.start < 0:
            raise ValueError("tokenizer.adversary: weight, lecam_weight and start must not be negative")
        if self.ch < 32 or self.ch % 32 or self.layers < 1:
            raise ValueError(f"tokenizer.adversary: ch = {self.ch} must be a multiple of 32, layers = {self.layers} at least 1")


@dataclass(frozen=True)
class TokenizerTraining:
    """Recipe 'tokenizer': L1 + perceptual + adversarial + entropy + commitment; a weight of 0 switches a term off."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    init: str = ""  # tokenizer to start from (a run, a checkpoint or a model folder); its encoder must be that of `model`
    freeze_encoder: bool = False  # train the decoder alone: the bits of every picture stay what they are
    groups: int = 4  # of the entropy loss
    pool_groups: bool = True
    temperature: float = 0.01
    l1_weight: float = 1.0
    l2_weight: float = 0.0  # OURS: helps PSNR in short runs
    perceptual: str = ""  # LPIPS weights, a file that `bitdance tokenizer lpips` writes; empty: no perceptual term
    perceptual_weight: float = 1.0
    entropy_weight: float = 0.1
    commitment_weight: float = 0.25
    adversary: AdversaryTraining = field(default_factory=AdversaryTraining)


@dataclass(frozen=True)
class GeneratorTraining:
    """Recipe 'generator': velocity loss + text cross-entropy on top of a frozen tokenizer.

    `tokenizer` is a run of recipe 'tokenizer', a checkpoint of one, or a folder with ae_config.json and ae.safetensors.
    The backbone comes from `pretrained` (a local folder in transformers' layout) or from `backbone` (fields of a Qwen3 config)
    with a text tokenizer trained on the captions.
    """

    tokenizer: str = ""
    pretrained: str = ""
    backbone: Mapping[str, Any] = field(default_factory=dict)
    text_vocabulary: int = 4096
    text_extra: str = ""  # file with further text for the text tokenizer, one line each
    head: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""  # a whole model to start from: a run, a checkpoint or a folder in the published layout
    max_text_tokens: int = 256
    resolution_tokens: int = 0  # <|res_i|> for sides up to this; 0: 4096 / downsampling
    dropout: float = 0.1  # prompts replaced by the unconditional one
    flip_max: float = 0.1
    text_weight: float = 0.01
    defaults: Mapping[str, Any] = field(default_factory=dict)  # written to bitdance.json
    sample_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingConfig:
    recipe: str = ""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    tokenizer: TokenizerTraining = field(default_factory=TokenizerTraining)
    generator: GeneratorTraining = field(default_factory=GeneratorTraining)

    def __post_init__(self) -> None:
        if self.recipe not in ("tokenizer", "generator"):
            raise ValueError(f"recipe = {self.recipe!r}; allowed are 'tokenizer' and 'generator'")
        if not self.run.out:
            raise ValueError("run.out is empty; name the folder of this run, for example run.out = \"runs/mine\"")
        if not self.data.train:
            raise ValueError("data.train is empty; name the shards, for example data.train = [\"shards/*.tar\"]")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a TOML config, its one parent and the dotted overrides (`a.b=value`). ValueError names the file and the key."""
    values = _read(Path(path))
    if "extends" in values:
        name = values.pop("extends")
        if not isinstance(name, str):
            raise ValueError(f"{path}: extends = {name!r}; expected the name of one file")
        parent_path = Path(path).parent / name
        parent = _read(parent_path)
        if "extends" in parent:
            raise ValueError(f"{parent_path} extends another config; only one level is allowed")
        values = _merge(parent, values)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {override!r}; write it as section.key=value, for example run.steps=100")
        nested: Any = _toml_value(text)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        values = _merge(values, nested)
    try:
        return _build(TrainingConfig, values, "")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values, for logs and checkpoints."""
    return dataclasses.asdict(config)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist; the ones that ship with the project lie in configs/")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {where}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"unknown key {name}; {hint}")
        arguments[key] = _convert(hints[key], value, name)
    return cls(**arguments)


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(typing.cast(type, hint), value, name + ".")
    if origin is tuple:
        item, *others = typing.get_args(hint)
        length = None if others == [...] else 1 + len(others)
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
            raise ValueError(f"{name} = {value!r}; expected a list of {f'{length} values' if length else 'values'}")
        return tuple(_convert(item, v, f"{name}[{i}]") for i, v in enumerate(value))
    if isinstance(hint, type) and origin is None and not isinstance(hint, types.GenericAlias):
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{name} = {value!r}; expected {hint.__name__}")
        return value
    if isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"{name} = {value!r}; expected {hint}")
