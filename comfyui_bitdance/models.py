"""Model folders as ComfyUI lists them: those in `models/bitdance`, in further folders of that name, and the bundled one."""

from pathlib import Path
from typing import Any

import torch

from bitdance.folder.adapters import Adapter
from bitdance.folder.diffusers import is_diffusers
from bitdance.folder.parts import ADAPTER_CONFIG, DEMO, TOKENIZER_CONFIG, is_tokenizer_alone
from bitdance.generator import kind_of, load_pipeline, module_of
from bitdance.networks.precision import wanted_dtype
from bitdance.networks.quantize import check_quantization
from bitdance.values import check_number, shown

PLACE = "bitdance"  # the name of the kind of model folder in `folder_paths`


def register() -> None:
    """Tell ComfyUI of `models/bitdance`, so that extra_model_paths.yaml can name further folders of that kind."""
    import folder_paths

    folder_paths.add_model_folder_path(PLACE, str(Path(folder_paths.models_dir) / PLACE))


def models() -> dict[str, Path]:
    """Name → folder of every model; the bundled one first."""
    found = {name: path for name, path in _folders().items() if _is_model(path)}
    return {"demo": DEMO} | {name: path for name, path in found.items() if name != "demo"}


def adapters() -> dict[str, Path]:
    """Name → folder of every LoRA adapter."""
    return {name: path for name, path in _folders().items() if (path / ADAPTER_CONFIG).is_file()}


def _folders() -> dict[str, Path]:
    """Name → folder; of two with the same name that of the place which ComfyUI lists first."""
    import folder_paths

    places = [Path(place) for place in folder_paths.get_folder_paths(PLACE)]
    found = [path for place in reversed(places) if place.is_dir() for path in place.iterdir() if path.is_dir()]
    return dict(sorted((path.name, path) for path in found))


def _is_model(path: Path) -> bool:
    return is_diffusers(path) or ((path / TOKENIZER_CONFIG).is_file() and not is_tokenizer_alone(path))


def named(name: str, known: dict[str, Path], what: str = "model") -> Path:
    """The folder of that name. ValueError for one that is not listed: no path leads out of the listed places."""
    if name not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"no {what} folder {shown(name)} in models/{PLACE}; known are: {listed}")
    return known[name]


def stamp(*folders: Path) -> str:
    """What changes when a file of these folders does: names, sizes and times, so that 30 GB take a moment."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return "\n".join(f"{path} {(found := path.stat()).st_size} {found.st_mtime_ns}" for path in files)


def options(lora: str | None, lora_scale: float, **matrices: str | None) -> dict[str, Any]:
    """What is said beside folder and dtype, as arguments of `load_pipeline`. `matrices`: how which are quantised."""
    adapter = {} if lora is None else {"lora": named(lora, adapters(), "adapter"), "lora_scale": lora_scale}
    return {name: kind for name, kind in matrices.items() if kind is not None} | adapter


def check(name: str, dtype: str | None, said: dict[str, Any]) -> Path:
    """The folder of a model that can be loaded so, as far as that shows without its weights; `load` checks every file.
    ValueError or FileNotFoundError say what is allowed."""
    folder = named(name, models())
    kind_of(folder)
    wanted_dtype(dtype, torch.device("meta"))  # a device on which no speed is measured
    for option in module_of(folder).rules.unknown:
        if option in said:
            raise ValueError(f"{option} is not for the kind of model in {name}; leave it out")
    check_quantization(said.get("quantize"), said.get("quantize_head"), device())
    if "lora" in said:
        Adapter.read(said["lora"], check_number("lora_scale", said["lora_scale"]))
    return folder


def load(name: str, dtype: str | None, said: dict[str, Any]) -> Any:
    """The pipeline of a model, where ComfyUI computes; other models make room for it."""
    import comfy.model_management

    folder = check(name, dtype, said)
    comfy.model_management.free_memory(sum(path.stat().st_size for path in folder.rglob("*.safetensors")), device())
    with torch.inference_mode(False):  # weights that also work outside of ComfyUI's inference mode
        return load_pipeline(folder, device(), dtype, **said)


def device() -> torch.device:
    """Where ComfyUI computes."""
    import comfy.model_management

    found: torch.device = comfy.model_management.get_torch_device()
    return found
