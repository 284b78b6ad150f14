"""Prompts → features of their tokens, by a frozen text encoder that lies in a folder as transformers keeps it: the encoder of
umT5 (or T5), or any language model that can be a backbone, whose last hidden states are the features.

T tokens of a prompt, E features of a token. Source: GRN paper (arXiv 2604.13030) for umT5; published code for how it reads text.
"""

import html
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.foreign import encoder_config, load_text_tokenizer
from bitdance.sequence.prompt import check_prompt, conditional_ids
from lfq_tokenizer.files import check_links
from lfq_tokenizer.json_file import read_config, read_json
from lfq_tokenizer.weights import check_shapes, read_safetensors, read_shapes, read_weight_map

T5_FAMILY = ("umt5", "t5")
T5_TOKENS = 512  # of a prompt, at most
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model", "vocab.json"),
    *("merges.txt", "added_tokens.json", "generation_config.json"),
)


@dataclass(frozen=True)
class PromptReader:
    """Prompts → token ids, as the encoder of a family wants them; no weights. `prefix` stands in front of every prompt."""

    tokenizer: Any
    t5: bool
    prefix: str = ""

    def ids(self, prompt: str) -> list[int]:
        """At least one id; "" is what stands for no prompt. ValueError for what is no text."""
        text = check_prompt(prompt)
        text = self.prefix + text if text else text
        if not self.t5:
            return conditional_ids(self.tokenizer, text)
        text = cleaned(text)
        found = self.tokenizer(text, max_length=T5_TOKENS, truncation=True, add_special_tokens=True)["input_ids"]
        return [int(number) for number in found]


def cleaned(text: str) -> str:
    """As the published code reads a prompt: repaired Unicode, HTML entities resolved, single spaces."""
    try:
        from ftfy import fix_text
    except ModuleNotFoundError:
        raise ValueError("prompts for T5 are repaired by ftfy, which is not here; pip install 'bitdance[umt5]'") from None
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fix_text(text)))).strip()


class TextEncoder(nn.Module):
    """See the module's docstring. `folder` is where it was read from."""

    def __init__(self, network: nn.Module, reader: PromptReader, width: int, folder: Path) -> None:
        super().__init__()
        self.network, self.reader, self.width, self.folder = network.requires_grad_(False).eval(), reader, width, folder

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, dtype: torch.dtype | None = None, prefix: str = "", weights: bool = True
    ) -> "TextEncoder":
        """Read a folder. `weights=False` leaves them on disk: then there are ids, and no features. FileNotFoundError or
        ValueError name the file that is missing, broken or does not fit."""
        from bitdance.networks.backbone import Backbone

        folder = Path(folder)
        width, t5 = width_of(folder), is_t5(folder)
        reader = PromptReader(load_text_tokenizer(folder), t5, prefix)
        if not weights:
            return cls(nn.Identity(), reader, width, folder)
        network = _t5(folder) if t5 else Backbone.from_pretrained(folder, dtype, output_head=False)
        return cls(network if dtype is None else network.to(dtype), reader, width, folder)

    @torch.no_grad()
    def features(self, ids: Sequence[int]) -> Tensor:
        """Ids of a prompt → (T,E), on the encoder's device."""
        device = next(self.network.parameters()).device
        ids_1T = torch.tensor([list(ids)], device=device)
        if self.reader.t5:
            return self.network(input_ids=ids_1T).last_hidden_state[0]
        return self.network(self.network.embed(ids_1T))[0]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Prompts → features (T,E) of each, computed one by one, so that a prompt's do not depend on the others."""
        known: dict[str, Tensor] = {}
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = self.features(self.reader.ids(prompt))
        return [known[prompt] for prompt in prompts]

    def save_pretrained(self, folder: Path) -> None:
        """Copy the files of the encoder; a model's folder may hold others beside them."""
        copy_encoder(self.folder, folder)


def copy_encoder(source: Path, folder: Path) -> None:
    """Copy what belongs to a text encoder from a folder that may hold more."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*FILES, *_weight_files(source), *([INDEX] if (source / INDEX).is_file() else [])]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def is_t5(folder: Path) -> bool:
    """Whether a folder's config names an encoder of the T5 family."""
    said = read_json(folder / "config.json")
    return isinstance(said, dict) and said.get("model_type") in T5_FAMILY


def width_of(folder: Path) -> int:
    """E, told from the config. FileNotFoundError or ValueError name the file."""
    from bitdance.foreign import build_config

    check_links(folder)
    t5 = is_t5(folder)
    config = read_config(folder / "config.json", encoder_config if t5 else build_config)
    for name in _weight_files(folder):
        read_shapes(folder / name)  # which is there and whole
    return int(config.d_model if t5 else config.hidden_size)


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    return sorted(set(read_weight_map(folder / INDEX).values()))


def _t5(folder: Path) -> nn.Module:
    """The encoder alone; a decoder that the files hold too is not read."""
    from transformers import T5EncoderModel, UMT5EncoderModel

    config = read_config(folder / "config.json", encoder_config)
    with torch.device("meta"):
        network = (UMT5EncoderModel if config.model_type == "umt5" else T5EncoderModel)(config)
    state: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        state |= {key: t for key, t in read_safetensors(folder / name).items() if key.startswith(("encoder.", "shared."))}
    shared = state.get("shared.weight", state.get("encoder.embed_tokens.weight"))
    if shared is not None:
        state |= {"shared.weight": shared, "encoder.embed_tokens.weight": shared}
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, folder / WEIGHTS)
    network.load_state_dict(state, strict=True, assign=True)
    return network


_WAN = (
    ("token_embedding.", "shared."),
    ("blocks.", "encoder.block."),
    (".norm1.", ".layer.0.layer_norm."),
    (".norm2.", ".layer.1.layer_norm."),
    (".attn.", ".layer.0.SelfAttention."),
    (".pos_embedding.embedding.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".ffn.gate.0.", ".layer.1.DenseReluDense.wi_0."),
    (".ffn.fc1.", ".layer.1.DenseReluDense.wi_1."),
    (".ffn.fc2.", ".layer.1.DenseReluDense.wo."),
)


def transformers_name(name: str) -> str:
    """The name that transformers gives to a tensor of the umT5 file that GRN's authors published (Wan's layout)."""
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    for theirs, ours in _WAN:
        name = name.replace(theirs, ours)
    return name
