"""Training configs: frozen dataclasses as schema, TOML as values.

    extends = "base.toml"          one level, relative to the file
    recipe = "tokenizer"           or "generator"
    [run] [data] [optimizer] [deepspeed] [tokenizer] [generator]

`--set run.steps=10` changes one value; values are read as TOML, and a word that is not TOML is a string. Unknown keys and values
out of range are errors: a field says what it allows (`schema.py`).
"""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from bitdance.values import RANGES, Range
from lfq_tokenizer import TokenizerConfig, limits
from lfq_tokenizer.json_file import read_bytes
from lfq_tokenizer.scale_vae import ScaleConfig
from lfq_tokenizer.text import decoded, printable
from stages import tables
from stages.schema import Checked, Choice, Decay, Positive, Rate, Share, Steps, StepsOrNone, Weight, build

AUTO = "auto"
PRECISIONS = (AUTO, "float32", "bfloat16", "bfloat16-weights")


@dataclass(frozen=True)
class RunConfig(Checked):
    """Length and rhythm. Steps are optimiser steps; `out` is the run's folder."""

    SECTION = "run"

    out: str = ""
    steps: Steps = 1000
    batch_size: Annotated[int, RANGES["batch_size"]] = 32  # samples per process and micro-step
    accumulation: Annotated[int, Range(1, 65_536)] = 1  # micro-steps per optimiser step
    seed: Annotated[int, RANGES["seed"]] = 0
    ema: Decay = 0.999  # decay of the averaged weights; 0 switches averaging off
    # "bfloat16": float32 weights, bfloat16 autocast; "bfloat16-weights": float32 kept by ZeRO alone; "auto": bfloat16 where the
    # machine has instructions for it, else float32
    precision: Annotated[str, Choice(PRECISIONS)] = "float32"
    compile: bool = False
    workers: Annotated[int, Range(0, 1024)] = 0  # loader processes per training process; the samples do not depend on it
    prefetch: Annotated[int, Range(1, 4096)] = 4  # micro-steps that each of them prepares ahead
    wandb: str = ""  # project to report to, where wandb is installed
    log_every: Steps = 20
    validate_every: Steps = 500
    sample_every: Steps = 500
    save_every: Steps = 500
    keep: Steps = 2  # newest checkpoints kept


@dataclass(frozen=True)
class SourceConfig(Checked):
    """One of several sources of training samples: `weight` is its share of the samples."""

    SECTION = "data.sources"

    places: tuple[str, ...] = ()
    weight: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.places:
            raise ValueError("data.sources: places is empty; name the shards of this source")


@dataclass(frozen=True)
class DataConfig(Checked):
    """Shards: paths, globs or URLs of webdataset tars. Relative paths are relative to where the command runs.

    `mix` gives each resolution (pixels: the side of a square of that area) its share of the pictures, for instance
    `{256 = 2, 512 = 7, 1024 = 1}`; without it every picture is taken in its own size. `keep` are conditions on a sample's
    attributes, all of which must hold, for instance `"aesthetic >= 5.5"`.
    """

    SECTION = "data"

    train: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()  # instead of `train`, where there are several with weights
    heldout: tuple[str, ...] = ()
    mix: Annotated[Mapping[str, float], tables.MIX] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    enlarge: Annotated[float, Range(1, 1000, whole=False)] = 1.0  # a picture may be enlarged by this to reach a resolution
    row_tokens: StepsOrNone = 0  # documents share rows of at most this many tokens; 0: one document per row
    mirror: bool = False  # random left-right flips (recipes 'tokenizer' and 'class_patch')
    # random square crops of this side, one place per batch; 0: whole pictures (tokenizer only)
    crop: Annotated[int, Range(0, 65_536)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix and not any(self.mix.values()):
            raise ValueError("data.mix: all shares are 0, so no picture is taken; give one resolution a share above 0")

    def refuse(self, recipe: str, *names: str) -> None:
        """ValueError for settings among `names` that are given, and that the recipe does not use."""
        if given := [f"data.{name}" for name in names if getattr(self, name)]:
            raise ValueError(
                f"{', '.join(given)}: recipe {recipe!r} reads data.train alone, pictures of one size; leave them out"
            )


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW, or Muon for `matrices`. After a linear warm-up `schedule` is 'constant', or goes down to `final_fraction` of lr:
    'cosine', or 'linear' after the share `hold` of the steps that are left."""

    SECTION = "optimizer"

    lr: Rate = 1e-5
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Share = 1e-15
    matrices: Annotated[str, Choice(("adamw", "muon"))] = "adamw"  # how the matrices of linear layers learn
    weight_decay: Weight = 0.0
    weight_decay_end: Weight = 0.0  # at the last step, along a cosine; 0: it stays what it is
    # parameters that weight decay leaves alone: a part of their names, or "vectors" for all of fewer than two dimensions
    no_decay: tuple[str, ...] = ()
    warmup_steps: StepsOrNone = 2000
    warmup_from: Share = 0.0  # the factor on lr at the first step; 0: that of one step of the warm-up
    schedule: Annotated[str, Choice(("constant", "cosine", "linear"))] = "constant"
    hold: Decay = 0.0
    final_fraction: Share = 0.0
    clip: Weight = 1.0  # gradient norm; 0 switches clipping off
    scale: Annotated[Mapping[str, float], tables.SCALE] = field(default_factory=dict)  # part (backbone, head, …) → factor on lr


@dataclass(frozen=True)
class DeepSpeedConfig(Checked):
    """What is handed to DeepSpeed beside batch size, clipping and precision. `settings` is merged into its JSON config last."""

    SECTION = "deepspeed"

    zero_stage: Annotated[int, Range(0, 3)] = 0
    offload_optimizer: bool = False  # moments and master weights live in the host's memory (ZeRO 1 to 3)
    offload_parameters: bool = False  # weights too (ZeRO 3)
    settings: Annotated[Mapping[str, Any], tables.DEEPSPEED] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("deepspeed.offload_parameters needs deepspeed.zero_stage 3")


@dataclass(frozen=True)
class AdversaryTraining(Checked):
    """The discriminator of recipe 'tokenizer'. It begins to train, and to be deceived, at step `start`."""

    SECTION = "tokenizer.adversary"

    weight: Weight = 0.0  # of deceiving it, in the tokenizer's loss (published: 0.1); 0: there is no discriminator
    start: StepsOrNone = 0
    lecam_weight: Weight = 0.05
    lecam_decay: Share = 0.999
    ch: Annotated[int, Range(32, limits.WIDTH)] = 64
    layers: Annotated[int, Range(1, 16)] = 3
    lr: Rate = 1e-4
    betas: tuple[Decay, Decay] = (0.5, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ch % 32:
            raise ValueError(f"tokenizer.adversary.ch = {self.ch}; a multiple of 32 is allowed")


@dataclass(frozen=True)
class TokenizerTraining(Checked):
    """Recipe 'tokenizer': L1 + perceptual + adversarial + entropy + commitment; a weight of 0 switches a term off."""

    SECTION = "tokenizer"

    # `quantizer = "multi_scale"`: a tokenizer of scales, of codes where `codes` says how many, else of bits
    model: Annotated[TokenizerConfig | ScaleConfig, tables.TOKENIZER] = field(default_factory=TokenizerConfig)
    init: str = ""  # tokenizer to start from (a run, a checkpoint or a model folder); its encoder must be that of `model`
    freeze_encoder: bool = False  # train the decoder alone: the bits of every picture stay what they are
    groups: Annotated[int, Range(1, limits.WIDTH)] = 4  # of the entropy loss
    pool_groups: bool = True
    temperature: Positive = 0.01
    l1_weight: Weight = 1.0
    l2_weight: Weight = 0.0  # OURS: helps PSNR in short runs
    perceptual: str = ""  # LPIPS weights, a file that `bitdance tokenizer lpips` writes; empty: no perceptual term
    perceptual_weight: Weight = 1.0
    entropy_weight: Weight = 0.1
    commitment_weight: Weight = 0.25
    adversary: AdversaryTraining = field(default_factory=AdversaryTraining)
    scale_dropout: Decay = 0.0  # of every scale of bits but the last, in a step
    idle_steps: StepsOrNone = 100  # after which a code that nothing used begins anew; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.model, ScaleConfig) and not self.model.sides:
            raise ValueError("tokenizer.model.sides is empty; name the side of every scale, for example sides = [1, 2, 4, 8]")
        if self.scale_dropout and self.model.quantizer != "bits":
            raise ValueError(f"tokenizer.scale_dropout = {self.scale_dropout}: it is for bits at every scale; leave it out")


PARTS = ("backbone", "projector", "head")


@dataclass(frozen=True)
class LoraTraining(Checked):
    """[generator.lora]: instead of the model's own weights, train low-rank changes s·B·A of its linear layers, s = alpha / rank.

    `targets`: "backbone" and "head" mean all linear layers of the LLM's layers and of the head's blocks, "head.net" all of the
    head's but the embedding of times; any other name means the linear layers whose name ends in it, for instance "q_proj",
    "attn.wqkv" or "head.net.final_layer.linear".
    """

    SECTION = "generator.lora"

    rank: Annotated[int, Range(1, limits.WIDTH, hint="; leave [generator.lora] out to train all weights")] = 16
    alpha: Positive = 16.0
    dropout: Decay = 0.0  # of what goes into A
    targets: tuple[str, ...] = ("backbone", "head")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ValueError('generator.lora.targets is empty; name layers, or leave it out for ["backbone", "head"]')


@dataclass(frozen=True)
class GeneratorTraining(Checked):
    """Recipe 'generator': velocity loss + text cross-entropy on top of a frozen tokenizer.

    `tokenizer` is a run of recipe 'tokenizer', a checkpoint of one, or a folder with ae_config.json and ae.safetensors.
    The backbone comes from `pretrained` (a local folder in transformers' layout) or from `backbone` (fields of a Qwen3 config)
    with a text tokenizer trained on the captions. With `init` the model of an earlier stage goes on; what the config says beside
    it about tokenizer, backbone and head must then fit that model.
    """

    SECTION = "generator"

    stage: str = ""  # "pretrain", "continue", "finetune", …: written into the model's card
    tokenizer: str = ""
    pretrained: str = ""
    backbone: Annotated[Mapping[str, Any], tables.BACKBONE] = field(default_factory=dict)
    text_vocabulary: Annotated[int, Range(1, 10**7)] = 4096
    text_extra: str = ""  # file with further text for the text tokenizer, one line each
    head: Annotated[Mapping[str, Any], tables.HEAD] = field(default_factory=dict)
    init: str = ""  # the stage before: a run, a checkpoint or a folder in the published layout
    freeze: tuple[Annotated[str, Choice(PARTS)], ...] = ()  # parts that do not learn
    lora: LoraTraining | None = None  # train an adapter to the model of `init`, which stays as it is
    checkpoint_activations: bool = False  # recompute a layer's inside in the backward pass instead of keeping it
    attention: Annotated[str, Choice(("auto", "dense", "flex"))] = "auto"  # auto: flex on CUDA, dense elsewhere
    kernels: Annotated[str, Choice(("auto", "none"))] = "auto"  # auto: fused kernels of Liger on CUDA where it is installed
    max_text_tokens: Annotated[int, Range(1, 10**6)] = 256
    # <|res_i|> for sides up to this; 0: 4096 / downsampling, or as many as `init` has
    resolution_tokens: Annotated[int, Range(0, 65_536)] = 0
    dropout: Share = 0.1  # prompts replaced by the unconditional one
    flip_max: Share = 0.1
    text_weight: Weight = 0.01
    defaults: Annotated[Mapping[str, Any], tables.DEFAULTS] = field(default_factory=dict)  # written to bitdance.json
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora and not self.init:
            raise ValueError("generator.lora trains an adapter to a finished model; name that model in generator.init")
        if self.lora and self.freeze:
            raise ValueError("generator.freeze beside generator.lora: all but the adapter is frozen; choose by lora.targets")


# recipe → the command that trains it
COMMANDS = {
    "tokenizer": "bitdance train",
    "generator": "bitdance train",
    "class_patch": "bitdance train",
    "refine": "bitdance train",
    "next_scale": "bitdance train",
    "distill": "bitdance distill",
    "few_steps": "bitdance distill",
    "few_steps_class": "bitdance distill",
}


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
            raise ValueError('run.out is empty; name the folder of this run, for example run.out = "runs/mine"')
        if self.data.train and self.data.sources:
            raise ValueError("data.train and data.sources are both given; name the shards in one of them")
        if not self.data.train and not self.data.sources:
            raise ValueError('data.train is empty; name the shards, for example data.train = ["shards/*.tar"]')
        if self.generator.lora and self.recipe not in ("generator", "few_steps"):
            raise ValueError(f"generator.lora is not for recipe {self.recipe!r}; it belongs to 'generator' and 'few_steps'")


Schema = TypeVar("Schema", bound=TrainingConfig)


# The schema of a recipe that has a section of its own, by the recipe's name; it lies with the recipe.
SCHEMAS = {
    "class_patch": "stages.recipes.class_patch.config.ClassTrainingConfig",
    "refine": "stages.recipes.refine.config.RefineTrainingConfig",
    "next_scale": "stages.recipes.next_scale.config.NextScaleTrainingConfig",
}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The config of `bitdance train`, of whatever recipe; see `read_config`."""
    values = read_values(path, overrides)
    module, _, name = SCHEMAS.get(str(values.get("recipe")), "").rpartition(".")
    return _checked(path, values, getattr(import_module(module), name) if module else TrainingConfig)


def read_config(path: Path | str, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read a TOML config, its one parent and the dotted overrides (`a.b=value`). ValueError names the file and the key, or the
    command that the config is meant for."""
    return _checked(path, read_values(path, overrides), schema)


def _checked(path: Path | str, values: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """The config of these values."""
    recipe = values.get("recipe")
    if recipe in COMMANDS and recipe not in schema.RECIPES:
        raise ValueError(f"{path}: recipe = {recipe!r} is trained by another command: {COMMANDS[recipe]} {path}")
    try:
        return build(schema, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_values(path: Path | str, overrides: Sequence[str]) -> dict[str, Any]:
    """What the file, its one parent and the overrides say, not yet checked against a schema."""
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
        nested: Any = _toml_value(text, key)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        values = _merge(values, nested)
    return values


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values, for logs and checkpoints."""
    return dataclasses.asdict(config)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"config {printable(path)} does not exist; the ones that ship with the project lie in configs/")
    text = decoded(read_bytes(path, limits.CONFIG_BYTES), str(path))
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is not valid TOML: nested too deeply") from None
    except ValueError as error:  # of TOML, or of a number with more digits than Python converts
        raise ValueError(f"{path} is not valid TOML: {printable(error)}") from None


def _toml_value(text: str, key: str) -> Any:
    """The one value that the text is; a text that is no TOML is a string."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError):
        raise ValueError(f"--set {key}: a number of too many digits, or a value nested too deeply") from None
    return found["value"] if len(found) == 1 else text


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
