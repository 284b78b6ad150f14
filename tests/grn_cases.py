"""The recorded numbers of tests/golden/grn (its PARITY.md explains each case), and the recorded models."""

from functools import cache

import golden_cases
import torch
from golden_cases import GOLDEN, case, meta
from safetensors.torch import load_file
from torch import Tensor

from bitdance.folder.published import flat_blocks
from bitdance.kinds.refine.class_network import ClassRefineNetwork
from bitdance.kinds.refine.config import ClassRefineConfig, TextRefineConfig
from bitdance.kinds.refine.text_network import TextRefineNetwork
from lfq_tokenizer.hbq_vae import HBQConfig, HBQTokenizer, picture_part

FOLDER = GOLDEN / "grn"


def recorded() -> dict:
    return meta("grn")


def grn_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors without the case's prefix) of one case; integers as int64."""
    info, found = case(name, "grn")
    return info, {k: v.long() if v.dtype == torch.int32 else v for k, v in found.items()}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    golden_cases.close(found, expected, tolerance)


def weights(name: str) -> dict[str, Tensor]:
    """A recorded checkpoint, in float32."""
    return {k: v.float() for k, v in load_file(str(FOLDER / f"{name}.safetensors")).items()}


@cache
def hbq_tokenizer() -> HBQTokenizer:
    """Shared: do not change it."""
    state = picture_part(weights("tokenizer"))
    tokenizer = HBQTokenizer(HBQConfig.from_shapes({k: tuple(v.shape) for k, v in state.items()}, rounds=3))
    tokenizer.load_state_dict(state, strict=True)
    return tokenizer.eval()


@cache
def class_network(form: str) -> ClassRefineNetwork:
    """Of the form "ind" or "bit". Shared: do not change it."""
    said, rounds = recorded()["config"][f"c2i_{form}"], 3
    config = ClassRefineConfig(
        width=said["hidden_size"],
        depth=said["depth"],
        heads=said["num_heads"],
        bits=recorded()["config"]["tokenizer"]["latent_channels"] * rounds,
        rounds=rounds,
        labels=form,
        bottleneck=said["bottleneck_dim"],
        in_context_len=said["in_context_len"],
        in_context_start=said["in_context_start"],
        num_classes=said["num_classes"],
        grid=said["img_size"] // 16,
    )
    network = ClassRefineNetwork(config)
    network.load_state_dict({name.removeprefix("net."): tensor for name, tensor in weights(f"c2i_{form}").items()}, strict=True)
    return network.eval()


@cache
def text_network(form: str, attention: str) -> TextRefineNetwork:
    """Of the form "ind" or "bit", with "prefix" or "joint" attention. Shared: do not change it."""
    said = recorded()["config"]["t2i"]
    config = TextRefineConfig(
        width=said["embed_dim"],
        depth=said["depth"],
        heads=said["num_heads"],
        bits=said["latent_channels"] * said["hbq_round"],
        rounds=said["hbq_round"],
        labels=form,
        text_width=said["text_channels"],
        mlp_ratio=said["mlp_ratio"],
        attention=attention,
    )
    network = TextRefineNetwork(config)
    network.load_state_dict(flat_blocks(weights(f"t2i_{form}")), strict=True)
    return network.eval()
