"""The recorded numbers of tests/golden/var and tests/golden/infinity (their PARITY.md explains each case), and the recorded
models."""

import json
from functools import cache

import golden_cases
import torch
from golden_cases import GOLDEN, case, meta
from safetensors.torch import load_file
from torch import Tensor

from bitdance.kinds.next_scale.config import NextScaleConfig
from bitdance.kinds.next_scale.network import NextScaleNetwork
from bitdance.kinds.next_scale.published import renamed
from lfq_tokenizer import scale_file
from lfq_tokenizer.scale_vae import ScaleTokenizer

VAR, INFINITY = GOLDEN / "var", GOLDEN / "infinity"
SIDES = [(side, side) for side in (1, 2, 3, 4, 5)]  # of the recorded VAR models


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    golden_cases.close(found, expected, tolerance)


def var_recorded() -> dict:
    return meta("var")


def infinity_recorded() -> dict:
    return meta("infinity")


def var_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors without the case's prefix) of one case."""
    return case(name, "var")


def infinity_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """The same of Infinity; the schedule as pairs."""
    info, found = case(name, "infinity")
    sides = {"sides": [(h, w) for _, h, w in info["schedule"]]} if "schedule" in info else {}
    return info | sides, found


def in_float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


@cache
def var_state(name: str) -> dict[str, Tensor]:
    """A recorded checkpoint of VAR as published, in float32."""
    return in_float32(load_file(str(VAR / f"{name}.safetensors")))


@cache
def var_tokenizer() -> ScaleTokenizer:
    """Shared: do not change it."""
    state = scale_file.renamed(var_state("vae"))
    tokenizer = ScaleTokenizer(scale_file.config_of({k: tuple(v.shape) for k, v in state.items()}, 5))
    tokenizer.load_state_dict(state, strict=True)
    return tokenizer.eval()


def var_network(name: str, drop_path: float = 0.0) -> NextScaleNetwork:
    """A recorded transformer, "var" or "var_saln"."""
    said = json.loads((VAR / "config.json").read_text())
    c, vae = said[name], said["vae"]
    config = NextScaleConfig(
        condition="class",
        tokens="codes",
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        inner=4 * c["embed_dim"],
        latents=vae["Cvae"],
        values=vae["V"],
        sides=tuple(c["patch_nums"]),
        num_classes=c["num_classes"],
        shared_ada=c["shared_aln"],
        drop_path=drop_path,
    )
    network = NextScaleNetwork(config)
    network.load_state_dict(renamed(var_state(name)), strict=True)
    return network.eval()


@cache
def infinity_tokenizer(which: str) -> ScaleTokenizer:
    """ "vae_a" or "vae_b". Shared: do not change it."""
    said = infinity_recorded()["config"][which]
    tokenizer = scale_file.read_scales(INFINITY / said["file"]).float()
    return tokenizer.patchified() if which == "vae_b" else tokenizer


@cache
def infinity_state(which: str) -> dict[str, Tensor]:
    """ "gpt_a" or "gpt_b" as published, in float32."""
    said = infinity_recorded()["config"][which]
    if "file" in said:
        return in_float32(torch.load(INFINITY / said["file"], weights_only=True))
    state: dict[str, Tensor] = {}
    for path in sorted((INFINITY / said["folder"]).glob("*.safetensors")):
        state |= load_file(str(path))
    return in_float32(state)


def infinity_network(which: str) -> NextScaleNetwork:
    """ "gpt_a" or "gpt_b"."""
    c = infinity_recorded()["config"][which]
    config = NextScaleConfig(
        condition="text",
        tokens="bits",
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        inner=256 * round(4 * c["embed_dim"] / 256),
        latents=infinity_tokenizer(c["vae"]).config.bits,
        values=2,
        sides=(1, 2, 4, 6, 8),
        text_width=c["text_channels"],
        text_tokens=c["text_maxlen"],
        levels=15,
        shared_ada=True,
        rotary=True,
    )
    network = NextScaleNetwork(config)
    network.load_state_dict(renamed(infinity_state(which)), strict=True)
    return network.eval()


def by_scale(tokens_BLx: Tensor, sides: list[tuple[int, int]]) -> list[Tensor]:
    """(B,L,…) → (B,h,w,…) of every scale; channels, if any, come second."""
    found, at = [], 0
    for h, w in sides:
        part = tokens_BLx[:, at : at + h * w].unflatten(1, (h, w))
        found.append(part.movedim(-1, 1) if part.ndim == 4 else part)
        at += h * w
    assert at == tokens_BLx.shape[1]
    return found


def joined(scales: list[Tensor]) -> Tensor:
    """(B,h,w) or (B,T,h,w) of every scale → (B,L) or (B,L,T)."""
    return torch.cat([one.flatten(1) if one.ndim == 3 else one.flatten(2).transpose(1, 2) for one in scales], dim=1)
