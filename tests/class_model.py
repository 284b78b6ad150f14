"""The recorded class-conditional models of tests/golden/imagenet, and one with random weights, for the tests of this kind."""

import dataclasses
from functools import cache

import torch
from golden_cases import GOLDEN

from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.model import ClassPatchModel
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.weights import load_strict, read_safetensors

FOLDER = GOLDEN / "imagenet"
KINDS = {"1x": 1, "4x": 4, "16x": 16}


def golden_config(P: int, mode: str = "patch") -> ClassPatchConfig:
    said = read_json(FOLDER / "config.json")
    fields = {field.name for field in dataclasses.fields(ClassPatchConfig)}
    return ClassPatchConfig(**{k: v for k, v in said.items() if k in fields}, parallel_num=P, parallel_mode=mode)


def golden_state(P: int) -> dict[str, torch.Tensor]:
    """The weights without `vae.`; blocks of 4 and 16 share a file and differ in the number of queries."""
    state = read_safetensors(FOLDER / f"bitdance_{'1x' if P == 1 else 'parallel'}.safetensors")
    if P > 1:
        state["query_token"] = state["query_token"][:, : P - 1]
    return state


@cache
def golden_model(P: int, mode: str = "patch") -> ClassPatchModel:
    """Shared: do not change it."""
    model = ClassPatchModel(golden_config(P, mode))
    load_strict(model, {name: tensor.float() for name, tensor in golden_state(P).items()}, "the recorded weights")
    return model.eval()


@cache
def golden_tokenizer() -> LFQTokenizer:
    return LFQTokenizer.from_pretrained(GOLDEN / "t2i_ckpt").float()


def random_bits(B: int, config: ClassPatchConfig, seed: int = 0) -> torch.Tensor:
    """(B,C,h,w) ±1."""
    shape = B, config.latent_dim, config.grid, config.grid
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
