"""LoRA adapters (arXiv 2106.09685): a few MB that change the linear layers of a model, in the layout of the package peft.

    adapter_config.json          rank r, alpha, names of the layers
    adapter_model.safetensors    base_model.model.LAYER.lora_A.weight (r, in) and base_model.model.LAYER.lora_B.weight (out, r)
    bitdance.json                ours, optional: name and fingerprint of the base, what the adapter was trained on, and the
                                 defaults that hold with it in place of the base's, as with one to few evaluations

An adapter that is loaded is added to the weights: W + s·B·A, with s = alpha / r, the product and the sum in float64 on the CPU.
So generation is as fast as without, needs no peft, and computes with the very weights that a merged and exported model holds.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.folder.fingerprint import fingerprint
from bitdance.folder.parts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXTRAS_FILE, read_extras
from bitdance.heads.diffusion.settings import choose
from bitdance.model import BitDanceModel
from bitdance.sequence.vocabulary import with_words
from bitdance.values import Range, check_number, shown
from lfq_tokenizer.files import check_links
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import read_safetensors, read_shapes

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# what peft can do beside W + s·B·A, and how its config says that it does not
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    **dict.fromkeys(("arrow_config", "megatron_config", "velora_config", "monteclora_config", "lora_ga_config"), (None,)),
}
# how A and B began, where the base kept its weights; others (pissa, olora, corda, …) train beside a base that they changed
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


RANK = Range(1, 1 << 16)
ALPHA = Range(-1e6, 1e6, whole=False)


def _checked_defaults(found: Any, path: Path) -> dict[str, Any]:
    """ValueError where no model could have them."""
    if not isinstance(found, dict):
        raise ValueError(f'{path}: "defaults" is a {type(found).__name__}; expected a JSON object')
    try:
        choose(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def _has_rank(name: str, shape: tuple[int, ...], rank: int) -> bool:
    """Whether A is (rank, inputs), or B (outputs, rank)."""
    return len(shape) == 2 and shape[0 if name.endswith(A) else 1] == rank


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter, checked as far as that goes without the model. `strength` 1 is as trained."""

    folder: Path
    factor: float  # s
    strength: float
    base: str  # fingerprint of the model it was trained on; "" where the folder does not say
    base_name: str
    fingerprint: str
    defaults: Mapping[str, Any] = field(default_factory=dict)  # that take the place of the base's

    @classmethod
    def read(cls, folder: Path | str, strength: float = 1.0) -> "Adapter":
        """FileNotFoundError or ValueError name the file and what is wrong with it; only headers and JSON are read."""
        folder = Path(folder)
        if not (folder / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(
                f"no adapter in {str(folder)!r}, which lacks {ADAPTER_CONFIG}; `bitdance export RUN OUT --adapter` writes "
                f"a folder with that and {ADAPTER_WEIGHTS}"
            )
        check_links(folder)
        strength = check_number("lora_scale", strength)
        config = read_json(folder / ADAPTER_CONFIG)
        where = folder / ADAPTER_CONFIG
        if not isinstance(config, dict):
            raise ValueError(f"{where} holds no JSON object; export the adapter again")
        for name, allowed in PLAIN.items():
            if config.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{where}: {name} = {shown(config[name])}; only plain LoRA is read ({name} = {allowed[0]!r})")
        if (beginning := config.get("init_lora_weights", True)) not in BEGINNINGS:
            raise ValueError(
                f"{where}: init_lora_weights = {shown(beginning)} trains beside a base that it changed; convert the adapter "
                "to plain LoRA with peft (save_pretrained(…, path_initial_model_for_weight_conversion=…))"
            )
        for name in ("use_rslora",):
            if not isinstance(config.get(name, False), bool):
                raise ValueError(f"{where}: {name} = {shown(config[name])}; true or false is allowed")
        rank = RANK.check("r", config.get("r"), str(where))
        alpha = ALPHA.check("lora_alpha", config.get("lora_alpha"), str(where))
        shapes = read_shapes(folder / ADAPTER_WEIGHTS)
        if odd := [name for name in shapes if not (name.startswith(PREFIX) and name.endswith((A, B)))]:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS} holds {listed(odd)}, which is no part of a LoRA adapter")
        wrong = [f"{name} {list(shape)}" for name, shape in shapes.items() if not _has_rank(name, shape, rank)]
        if wrong:
            raise ValueError(
                f"{folder / ADAPTER_WEIGHTS}: {listed(wrong)}; {where.name} says r = {rank}, so A is ({rank}, inputs) and B "
                f"(outputs, {rank}). Weights and config must come from the same adapter."
            )
        extras = read_extras(folder)
        base = extras.get("base", {})
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        mark, name = (str(base.get(key, "")) if isinstance(base, dict) else "" for key in ("fingerprint", "name"))
        defaults = _checked_defaults(extras.get("defaults", {}), folder / EXTRAS_FILE)
        if defaults.get("sampler") == "direct" and strength != 1:
            raise ValueError(
                f"lora_scale = {strength:g} with the adapter {folder}, which teaches the head to make its bits in few "
                "evaluations; a part of it does neither: use it whole (lora_scale = 1), or leave it out"
            )
        return cls(folder, factor, float(strength), mark, name, fingerprint(folder), defaults)

    def settled(self, extras: Mapping[str, Any]) -> dict[str, Any]:
        """What the base's `bitdance.json` says, with the defaults of the adapter where that has any."""
        return {**extras, "defaults": {**extras.get("defaults", {}), **self.defaults}} if self.defaults else dict(extras)

    @property
    def words(self) -> dict[str, Any]:
        """What a picture says of the adapter that it was made with."""
        words: dict[str, Any] = {"lora": self.folder.resolve().name, "lora_fingerprint": self.fingerprint}
        return words if self.strength == 1 else {**words, "lora_scale": self.strength}

    def check_base(self, model: Path) -> None:
        """ValueError when the adapter says that it was trained on another model than the one in the folder `model`."""
        if self.base and self.base != (found := fingerprint(model)):
            called = f" ({self.base_name!r})" if self.base_name else ""
            raise ValueError(
                f"the adapter {self.folder} was trained on the model with fingerprint {self.base}{called}, {model} has {found}; "
                "name that model with --model"
            )

    @torch.no_grad()
    def add_to(self, model: BitDanceModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Add the adapter to the weights, in place, and return what they were, on the CPU. With `dtype` the changed weights come
        out in it, rounded from float32. The defaults of the adapter become the model's.

        ValueError, before a weight is changed, lists the first ten layers that the model lacks or has in another shape.
        """
        if model.quantized:
            raise ValueError("an adapter is added before weights are quantised: load the model again, with quantize and lora")
        layers, tensors = dict(adaptable(model)), read_safetensors(self.folder / ADAPTER_WEIGHTS)
        pairs = self._pairs(layers, tensors)
        if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
            raise ValueError(f"{self.folder / ADAPTER_WEIGHTS} holds NaN or infinity in {listed(broken)}; export it again")
        before = {}
        for name, (a_RI, b_OR) in pairs.items():
            layer = layers[name]
            old_OI = before[name] = layer.weight.detach().to("cpu", copy=True)
            change_OI = (self.strength * self.factor) * (b_OR.double() @ a_RI.double())
            new_OI = change_OI.add_(old_OI).float().to(dtype or old_OI.dtype)
            if new_OI.dtype == layer.weight.dtype:
                layer.weight.copy_(new_OI)  # in place: CUDA graphs hold the address
            else:
                layer.weight = nn.Parameter(new_OI.to(layer.weight.device), requires_grad=layer.weight.requires_grad)
        model.extras = with_words(self.settled(model.extras), self._captions())
        return before

    def _captions(self) -> list[str]:
        """What the adapter says that it was trained on: the words of its captions, or some of the captions."""
        extras = read_extras(self.folder)
        found = extras.get("words") or extras.get("prompts")
        return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []

    def _pairs(self, layers: dict[str, nn.Linear], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        names = list(dict.fromkeys(key.removeprefix(PREFIX).removesuffix(A).removesuffix(B) for key in tensors))
        pairs, wrong = {}, []
        for name in names:
            a, b = tensors.get(PREFIX + name + A), tensors.get(PREFIX + name + B)
            if name not in layers:
                wrong.append(f"{name} is no layer of this model")
            elif a is None or b is None:
                wrong.append(f"{name} lacks its {'A' if a is None else 'B'}")
            elif (b.shape[0], a.shape[-1]) != layers[name].weight.shape or b.shape[-1] != a.shape[0]:
                shape = f"{list(b.shape)} · {list(a.shape)}"
                wrong.append(f"{name} has shapes {shape}, the model's layer {list(layers[name].weight.shape)}")
            else:
                pairs[name] = a, b
        if wrong:
            raise ValueError(f"the adapter {self.folder} does not fit this model: {listed(wrong)}; it belongs to another one")
        return pairs


@torch.no_grad()
def restore(model: BitDanceModel, before: dict[str, Tensor]) -> None:
    """Put weights back that `Adapter.add_to` returned, bit for bit."""
    layers = dict(adaptable(model))
    for name, weight_OI in before.items():
        layers[name].weight.copy_(weight_OI)


def adaptable(model: BitDanceModel) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of all linear layers that an adapter may change: those of the LLM but its text output, which may be its
    embedding too, and those of the head but the embedding of times, whose results samplers keep."""
    lm = model.backbone.lm
    for name, module in lm.base_model.named_modules():
        if isinstance(module, nn.Linear):
            yield f"backbone.lm.{lm.base_model_prefix}.{name}", module
    for name, module in model.head.named_modules():
        if isinstance(module, nn.Linear) and "time_embed" not in name:
            yield f"head.{name}", module
