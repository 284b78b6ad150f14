"""LoRA (arXiv 2106.09685) through peft: the model of `generator.init` stays as it is, and small matrices beside it learn.

checkpoint/adapter/     the averaged adapter in peft's layout, see `bitdance/folder/adapters.py`; there is no model/ beside it
checkpoint/resume/      the adapter's weights, moments and averages; the frozen weights are those of `generator.init`
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bitdance.folder.adapters import PREFIX, adaptable
from bitdance.folder.checkpoint import load_model
from bitdance.folder.fingerprint import fingerprint
from bitdance.folder.parts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DEMO, EXTRAS_FILE, read_extras
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.model import BitDanceModel
from bitdance.networks.quantize import quietly
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.text import SHOWN
from lfq_tokenizer.weights import write_safetensors
from stages.config import GeneratorTraining, LoraTraining
from stages.engine.checkpoint import ADAPTER, model_folder

WHOLE_PARTS = {"backbone": ".layers.", "head": ".res_blocks.", "head.net": ""}  # what a part's name stands for in `targets`
Part = TypeVar("Part", bound=nn.Module)
_NAME = ".default"  # that peft gives to a model's only adapter, inside the names of its tensors


def add_lora(model: BitDanceModel, lora: LoraTraining) -> None:
    """Wrap the targeted layers, freeze everything else. A starts random from torch's global source, B at zero: the first step
    computes what the model computes. ValueError for targets that there are not."""
    try:
        with quietly():  # peft imports the libraries of quantised weights where they are
            from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError('generator.lora needs peft: pip install "bitdance[train]"') from None
    names = _targeted([name for name, _ in adaptable(model)], lora.targets)
    model.requires_grad_(False)
    inject_adapter_in_model(_peft_config(lora, names), model)


def without_lora(part: Part) -> Part:
    """A copy of a part of a model, without the adapters that `add_lora` put into it."""
    copied = copy.deepcopy(part)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(base := getattr(child, "base_layer", None), nn.Linear):
                setattr(parent, name, base)
    return copied


def check_lora(training: GeneratorTraining, model: BitDanceModel, head: HeadConfig) -> None:
    """ValueError where the config asks for what an adapter does not hold. `head` is the head's config of this stage."""
    if training.resolution_tokens > (known := len(model.special.res_ids)):
        raise ValueError(
            f"generator.resolution_tokens = {training.resolution_tokens} beside generator.lora: an adapter holds no new tokens; "
            f"the model has {known}"
        )
    if head.time_shift != model.head.config.time_shift:
        raise ValueError(
            f"generator.head.time_shift = {head.time_shift} beside generator.lora: an adapter does not hold it; the model has "
            f"{model.head.config.time_shift}"
        )


def base_of(training: GeneratorTraining) -> dict[str, str]:
    """Name and fingerprint of the model that the adapter belongs to."""
    folder = model_folder(training.init)
    return {"name": "demo" if folder == DEMO else folder.resolve().name, "fingerprint": fingerprint(folder)}


def save_adapter(model: BitDanceModel, folder: Path, lora: LoraTraining, extras: Mapping[str, Any]) -> None:
    """Write the adapter of a model that `add_lora` has changed into the new `folder`; `extras` go into its bitdance.json."""
    tensors = {PREFIX + name.replace(_NAME, ""): p.detach().float() for name, p in model.named_parameters() if _is_lora(name)}
    names = list(dict.fromkeys(key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors))
    config = {**_peft_config(lora, names).to_dict(), "target_modules": names, "inference_mode": True}
    folder.mkdir(parents=True)
    write_safetensors(tensors, folder / ADAPTER_WEIGHTS)
    write_json(json.loads(json.dumps(config, default=str)), folder / ADAPTER_CONFIG)
    write_json(dict(extras), folder / EXTRAS_FILE)


def merged_model(checkpoint: Path, base: Path | str | None) -> BitDanceModel:
    """The model that the adapter of a checkpoint makes of its base, in float32 on the CPU. Without `base` that is the
    `generator.init` of the run. ValueError where it is another model."""
    place = base or _init_of(checkpoint.parent / "config.json")
    model = load_model(model_folder(place), device="cpu", dtype=torch.float32, lora=checkpoint / ADAPTER)
    known, more = model.extras, read_extras(checkpoint / ADAPTER)
    prompts = list(dict.fromkeys([*known.get("prompts", []), *more.get("prompts", [])]))
    model.extras = {**known, "prompts": prompts, "card": more.get("card", {})}
    return model


def _init_of(path: Path) -> str:
    """`generator.init` of a run's config.json. ValueError, naming the file, where it says none."""
    found = read_json(path)
    generator = found.get("generator") if isinstance(found, dict) else None
    init = generator.get("init") if isinstance(generator, dict) else None
    if not isinstance(init, str) or not init:
        raise ValueError(f"{path} names no generator.init, the model that the adapter belongs to; name it with --base")
    return init


def _is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _targeted(layers: list[str], targets: tuple[str, ...]) -> list[str]:
    chosen: set[str] = set()
    for target in targets:
        if target in WHOLE_PARTS:
            found = [name for name in layers if name.startswith(target) and WHOLE_PARTS[target] in name]
        else:
            found = [name for name in layers if name == target or name.endswith("." + target)]
        if not found:
            endings = list(dict.fromkeys(name.rpartition(".")[2] if "backbone" in name else name for name in layers))
            raise ValueError(
                f"generator.lora.targets: no linear layer is called {target!r}; there are backbone, head, "
                f"{', '.join(endings[:SHOWN])}, …"
            )
        chosen.update(found)
    return [name for name in layers if name in chosen]


def _peft_config(lora: LoraTraining, names: list[str]) -> Any:
    from peft import LoraConfig

    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=names)  # type: ignore[arg-type]
