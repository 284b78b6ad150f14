"""Does a stage fit the one before it? Every refusal names both values and the next step."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitdance.heads.diffusion.network import HeadConfig
from bitdance.model import BitDanceModel
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_json
from stages.config import GeneratorTraining, TrainingConfig
from stages.data.pack import MANIFEST
from stages.recipes.tokenizer.coding import weights_hash

# of the head, what decides about its weights; everything else (times, noise draws) a stage may change
HEAD_SHAPE = ("ch_target", "ch_cond", "ch_latent", "depth_latent", "depth_adanln", "use_swiglu", "parallel_num")
ORIGIN = ("teacher",)  # what a card says of where a model came from; later stages keep it
SHOWN = 12  # characters of a hash


def tokenizer_hash(tokenizer: LFQTokenizer) -> str:
    """SHA-256 over names and values of encoder and decoder."""
    return weights_hash(tokenizer)


def encoder_hash(tokenizer: LFQTokenizer, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names and values of what makes the bits, as they are in `dtype` (default: as they are)."""
    return weights_hash(tokenizer.encoder if dtype is None else copy.deepcopy(tokenizer.encoder).to(dtype))


def check_chain(
    model: BitDanceModel, training: GeneratorTraining, tokenizer: LFQTokenizer | None = None, source: str = ""
) -> HeadConfig:
    """The model of `generator.init` (or what else `source` says) against what the config says beside it; `tokenizer` is that of
    `generator.tokenizer`.

    Returns the head's config for this stage: the model's, with the training values (times, noise draws) that the config gives.
    ValueError where patch, bits per token, tokenizer, head or backbone are others.
    """
    source = source or _init(training)
    head = stage_head(model.head.config, training, source)
    check_backbone(model.backbone.lm.config.to_dict(), training, source)
    if tokenizer is not None:
        assert model.tokenizer is not None
        bits, wanted = model.head.config.ch_target, tokenizer.config.bits
        if bits != wanted:
            raise ValueError(
                f"{source} predicts {bits} bits per token, generator.tokenizer = {training.tokenizer!r} makes {wanted}; name the "
                "tokenizer of the stage before, or leave generator.tokenizer empty"
            )
        ours, theirs = (encoder_hash(t, torch.float32) for t in (model.tokenizer, tokenizer))
        if ours != theirs:
            raise ValueError(
                f"{source} was trained on the bits of another encoder ({ours[:SHOWN]}…) than that of generator.tokenizer = "
                f"{training.tokenizer!r} ({theirs[:SHOWN]}…); name the tokenizer of the stage before, or leave "
                "generator.tokenizer empty"
            )
    return head


def check_bits(shards: Sequence[str], tokenizer: LFQTokenizer) -> None:
    """Shards of bits against the encoder of the model: what their pack.json says must be its hash. Shards without one, or at a
    URL, are taken as they are.

    ValueError names the folder and both hashes.
    """
    hashes: dict[torch.dtype, str] = {}
    for folder in sorted({Path(shard).parent for shard in shards if "://" not in shard}):
        path = folder / MANIFEST
        found = read_json(path) if path.is_file() else None
        source = found.get("source") if isinstance(found, dict) else None
        encoder = source.get("encoder") if isinstance(source, dict) else None
        if not encoder:
            continue
        if not isinstance(encoder, dict) or not isinstance(encoder.get("sha256"), str):
            raise ValueError(f"{path} does not say which encoder made these bits; encode the pictures again")
        named = getattr(torch, str(encoder.get("dtype", "float32")).removeprefix("torch."), None)
        dtype = named if isinstance(named, torch.dtype) else torch.float32
        if dtype not in hashes:
            hashes[dtype] = encoder_hash(tokenizer, dtype)
        if encoder["sha256"] != hashes[dtype]:
            raise ValueError(
                f"{path}: these bits come from another encoder ({encoder['sha256'][:SHOWN]}…) than that of the model "
                f"({hashes[dtype][:SHOWN]}…); encode the pictures again: bitdance tokenizer encode … --model with this tokenizer"
            )


def next_card(previous: Mapping[str, Any], stage: str, config: TrainingConfig, steps: int, images: int) -> dict[str, Any]:
    """`{"stages": […]}` for the model's card: the stages of the model that this run started from (`previous`: its `extras`), and
    this one after so many steps and images; beside it what that card says of the model's origin. It names no place of this
    machine.
    """
    card = previous.get("card", {})
    kept = {name: card[name] for name in ORIGIN if name in card}
    optimizer = config.optimizer
    own = {
        "name": stage or "train",
        "steps": steps,
        "images": images,
        "mix": dict(config.data.mix),
        "lr": optimizer.lr,
        "schedule": optimizer.schedule,
    }
    return json.loads(json.dumps({**kept, "stages": [*card.get("stages", []), own]}))


def stage_head(known: HeadConfig, training: GeneratorTraining, source: str = "") -> HeadConfig:
    """`known`, the head's config of the stage before, with the training values of this stage. ValueError for another shape."""
    source, wanted = source or _init(training), {**known.to_dict(), **training.head}
    if wanted["parallel_num"] != known.parallel_num:
        raise ValueError(
            f"{source} predicts {known.parallel_num} tokens per step, generator.head.parallel_num says {wanted['parallel_num']}; "
            "a model grows to larger patches with `bitdance distill`"
        )
    for name in HEAD_SHAPE:
        if wanted[name] != getattr(known, name):
            raise ValueError(
                f"{source} has a head with {name} = {getattr(known, name)!r}, generator.head says {wanted[name]!r}; "
                "correct the config: a stage goes on with the head of the stage before"
            )
    return HeadConfig.from_dict(wanted)


def check_backbone(known: Mapping[str, Any], training: GeneratorTraining, source: str = "") -> None:
    """The transformers config of the stage before against [generator.backbone]. The vocabulary may have grown."""
    for name, value in training.backbone.items():
        found = _field(known, name)
        if name != "vocab_size" and found is not None and found != value:
            raise ValueError(
                f"{source or _init(training)} has a backbone with {name} = {found!r}, generator.backbone says {value!r}; "
                "correct the config, or start from a stage with this backbone"
            )


def _init(training: GeneratorTraining) -> str:
    return f"generator.init = {training.init!r}"


def _field(config: Mapping[str, Any], name: str) -> Any:
    """A value of a transformers config; version 5 keeps those of the rotary embedding one level down."""
    if name in config:
        return config[name]
    return (config.get("rope_parameters") or {}).get(name)
