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
from typing import Any, ClassVar, TypeVar

from lfq_tokenizer import TokenizerConfig

PRECISIONS = ("float32", "bfloat16", "bfloat16-weights")


@dataclass(frozen=True)
class RunConfig:
    """Length and rhythm. Steps are optimiser steps; `out` is the run's folder."""

    out: str = ""
    steps: int = 1000
    batch_size: int = 32  # samples per process and micro-step
    accumulation: int = 1  # micro-steps per optimiser step
    seed: int = 0
    ema: float = 0.999  # decay of the averaged weights; 0 switches averaging off
    precision: str = "float32"  # "bfloat16": float32 weights, bfloat16 autocast; "bfloat16-weights": float32 kept by ZeRO alone
    compile: bool = False
    workers: int = 0  # loader processes per training process; the samples do not depend on it
    prefetch: int = 4  # micro-steps that each of them prepares ahead
    wandb: str = ""  # project to report to, where wandb is installed
    log_every: int = 20
    validate_every: int = 500
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"run.precision = {self.precision!r}; allowed are {', '.join(map(repr, PRECISIONS))}")
        counts = ("steps", "batch_size", "accumulation", "log_every", "validate_every", "sample_every", "save_every", "keep")
        for name, smallest in {**dict.fromkeys((*counts, "prefetch"), 1), "workers": 0}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"run.{name} = {getattr(self, name)}; it must be at least {smallest}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"run.ema = {self.ema}; it must be in [0, 1)")


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of training samples: `weight` is its share of the samples."""

    places: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.places or self.weight <= 0:
            raise ValueError(f"data.sources: places {self.places} must not be empty and weight {self.weight} positive")


@dataclass(frozen=True)
class DataConfig:
    """Shards: paths, globs or URLs of webdataset tars. Relative paths are relative to where the command runs.

    `mix` gives each resolution (pixels: the side of a square of that area) its share of the pictures, for instance
    `{256 = 2, 512 = 7, 1024 = 1}`; without it every picture is taken in its own size. `keep` are conditions on a sample's
    attributes, all of which must hold, for instance `"aesthetic >= 5.5"`.
    """

    train: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()  # instead of `train`, where there are several with weights
    heldout: tuple[str, ...] = ()
    mix: Mapping[str, float] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    enlarge: float = 1.0  # a picture may be enlarged by this factor to reach a resolution of the mix
    row_tokens: int = 0  # documents share rows of at most this many tokens; 0: one document per row
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
    scale: Mapping[str, float] = field(default_factory=dict)  # part of the model → factor on lr: backbone, projector, head

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule = {self.schedule!r}; allowed are 'constant' and 'cosine'")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What is handed to DeepSpeed beside batch size, clipping and precision. `settings` is merged into its JSON config last."""

    zero_stage: int = 0
    offload_optimizer: bool = False  # moments and master weights live in the host's memory (ZeRO 1 to 3)
    offload_parameters: bool = False  # weights too (ZeRO 3)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.zero_stage = {self.zero_stage}; allowed are 0, 1, 2 and 3")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("deepspeed.offload_parameters needs deepspeed.zero_stage 3")


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


PARTS = ("backbone", "projector", "head")


@dataclass(frozen=True)
class LoraTraining:
    """[generator.lora]: instead of the model's own weights, train low-rank changes s·B·A of its linear layers, s = alpha / rank.

    `targets`: "backbone" and "head" mean all linear layers of the LLM's layers and of the head's blocks; any other name means the
    linear layers whose name ends in it, for instance "q_proj", "attn.wqkv" or "head.net.final_layer.linear".
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0  # of what goes into A
    targets: tuple[str, ...] = ("backbone", "head")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"generator.lora.rank = {self.rank}; it must be at least 1; leave [generator.lora] out to train all")
        if self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"generator.lora: alpha = {self.alpha} must be positive and dropout = {self.dropout} in [0, 1)")
        if not self.targets:
            raise ValueError('generator.lora.targets is empty; name layers, or leave it out for ["backbone", "head"]')


@dataclass(frozen=True)
class GeneratorTraining:
    """Recipe 'generator': velocity loss + text cross-entropy on top of a frozen tokenizer.

    `tokenizer` is a run of recipe 'tokenizer', a checkpoint of one, or a folder with ae_config.json and ae.safetensors.
    The backbone comes from `pretrained` (a local folder in transformers' layout) or from `backbone` (fields of a Qwen3 config)
    with a text tokenizer trained on the captions. With `init` the model of an earlier stage goes on; what the config says beside
    it about tokenizer, backbone and head must then fit that model.
    """

    stage: str = ""  # "pretrain", "continue", "finetune", …: written into the model's card
    tokenizer: str = ""
    pretrained: str = ""
    backbone: Mapping[str, Any] = field(default_factory=dict)
    text_vocabulary: int = 4096
    text_extra: str = ""  # file with further text for the text tokenizer, one line each
    head: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""  # the stage before: a run, a checkpoint or a folder in the published layout
    freeze: tuple[str, ...] = ()  # parts that do not learn: backbone, projector, head
    lora: LoraTraining | None = None  # train an adapter to the model of `init`, which stays as it is
    checkpoint_activations: bool = False  # recompute a layer's inside in the backward pass instead of keeping it
    attention: str = "auto"  # "dense", "flex"; auto: flex on CUDA, dense elsewhere
    kernels: str = "auto"  # "none"; auto: fused kernels of Liger on CUDA where it is installed
    max_text_tokens: int = 256
    resolution_tokens: int = 0  # <|res_i|> for sides up to this; 0: 4096 / downsampling, or as many as `init` has
    dropout: float = 0.1  # prompts replaced by the unconditional one
    flip_max: float = 0.1
    text_weight: float = 0.01
    defaults: Mapping[str, Any] = field(default_factory=dict)  # written to bitdance.json
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("attention", self.attention, ("auto", "dense", "flex")),
            ("kernels", self.kernels, ("auto", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"generator.{name} = {value!r}; allowed are {', '.join(map(repr, allowed))}")
        if unknown := sorted(set(self.freeze) - set(PARTS)):
            raise ValueError(f"generator.freeze names {unknown}; parts are {', '.join(PARTS)}")
        if self.lora and not self.init:
            raise ValueError("generator.lora trains an adapter to a finished model; name that model in generator.init")
        if self.lora and self.freeze:
            raise ValueError("generator.freeze beside generator.lora: all but the adapter is frozen; choose by lora.targets")


# recipe → the command that trains it
COMMANDS = {"tokenizer": "bitdance train", "generator": "bitdance train", "distill": "bitdance distill"}


@dataclass(frozen=True)
class TrainingConfig:
    """What every command of training reads; a further room adds its own section in a subclass with its own `RECIPES`."""

    RECIPES: ClassVar[tuple[str, ...]] = ("tokenizer", "generator")

    recipe: str = ""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    tokenizer: TokenizerTraining = field(default_factory=TokenizerTraining)
    generator: GeneratorTraining = field(default_factory=GeneratorTraining)

    def __post_init__(self) -> None:
        if self.recipe not in self.RECIPES:
            raise ValueError(f"recipe = {self.recipe!r}; allowed are {' and '.join(map(repr, self.RECIPES))}")
        if not self.run.out:
            raise ValueError("run.out is empty; name the folder of this run, for example run.out = \"runs/mine\"")
        if self.data.train and self.data.sources:
            raise ValueError("data.train and data.sources are both given; name the shards in one of them")
        if not self.data.train and not self.data.sources:
            raise ValueError('data.train is empty; name the shards, for example data.train = ["shards/*.tar"]')
        if self.generator.lora and self.recipe != "generator":
            raise ValueError(f"generator.lora is not for recipe {self.recipe!r}; it belongs to recipe 'generator'")


Schema = TypeVar("Schema", bound=TrainingConfig)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Of `bitdance train`; see `read_config`."""
    return read_config(path, overrides, TrainingConfig)


def read_config(path: Path | str, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read a TOML config, its one parent and the dotted overrides (`a.b=value`). ValueError names the file and the key, or the
    command that the config is meant for."""
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
    recipe = values.get("recipe")
    if recipe in COMMANDS and recipe not in schema.RECIPES:
        raise ValueError(f"{path}: recipe = {recipe!r} is trained by another command: {COMMANDS[recipe]} {path}")
    try:
        return _build(schema, values, "")
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
    if isinstance(hint, types.UnionType):  # SECTION | None
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
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
