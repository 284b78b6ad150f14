"""`bitdance doctor`: versions, device, memory, attention backends, optional packages, and what fits.

With a model or a shape it says instead what a batch of pictures takes, phase by phase, and `--measure` makes one to compare:

    bitdance doctor --shape 14b-64x --dtype bfloat16 --quantize int8
    bitdance doctor --model demo --batch-size 16 --device cpu --measure
"""

import importlib.util
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bitdance.cli import Parser, print_json
from bitdance.cli.batch import add_options, check_unused, show

OPTIONAL = {
    "flash_attn": "attention in training on NVIDIA GPUs of compute capability 9 and 10: flash-attn-4",
    "deepspeed": "training",
    "webdataset": "training from shards",
    "tensorboard": "training curves",
    "torchmetrics": "SSIM and Fréchet distances of tokenizers",
    "resvg_py": "drawing icon sets",
}


def run(argv: Sequence[str]) -> int:
    """Print what this machine offers."""
    parser = Parser(prog="bitdance doctor", description="What this machine offers, and which published model fits.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_options(parser)
    options = parser.parse_args(argv)
    if options.model or options.shape:
        return show(options)
    check_unused(options)
    found = examine()
    if options.json:
        print_json(found)
        return 0
    print(f"bitdance {found['bitdance']}, Python {found['python']}, {found['system']}")
    print(", ".join(f"{name} {number or 'missing'}" for name, number in found["packages"].items()))
    for device in found["devices"]:
        print(f"device {device['device']}: {device['name']}, free memory {_gb(device['free_bytes'])}; {_bfloat16(device)}")
    print("attention: " + ", ".join(found["attention"]))
    for name, present in found["optional"].items():
        print(f"{name}: {'present' if present else 'not installed'} ({OPTIONAL[name]})")
    print(f"bundled model: {'present' if found['bundled_model'] else 'missing (generate needs --model DIR)'}")
    if found["fits"]:
        print(f"largest published setting that fits: {found['fits']['setting']} on {found['fits']['device']}")
    else:
        least = min(found["published"], key=lambda row: row["needs_bytes"])
        print(f"no published model fits; the smallest setting, {least['setting']}, needs {_gb(least['needs_bytes'])}")
    return 0


def examine() -> dict[str, Any]:
    """Everything that `doctor --json` prints. Needs of published models are computed, not measured."""
    from bitdance import __version__
    from bitdance.folder.parts import DEMO, LM_CONFIG

    devices = [{**device, **_dtypes(device["device"])} for device in _devices()]
    by_preference = sorted(devices, key=lambda device: (device["device"] == "cpu", -(device["free_bytes"] or 0)))
    best = "cuda" if by_preference[0]["device"].startswith("cuda") else "cpu"
    needs = {kind: published(kind) for kind in ("cpu", "cuda")}
    fits = next(
        (
            {"setting": setting, "device": device["device"], "needs_bytes": needed}
            for device in by_preference
            for setting, needed in needs["cuda" if device["device"].startswith("cuda") else "cpu"].items()
            if needed <= (device["free_bytes"] or 0)
        ),
        None,
    )
    return {
        "bitdance": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in ("torch", "transformers", "safetensors", "numpy", "pillow")},
        "devices": devices,
        "attention": _attention(),
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "bundled_model": (DEMO / LM_CONFIG).is_file(),
        "fits": fits,
        "published": [{"setting": name, "needs_bytes": needed} for name, needed in needs[best].items()],
    }


def published(kind: str) -> dict[str, int]:
    """Settings of the published 64-token model for one picture → bytes on a device of this kind, from the largest down."""
    from bitdance.costs.memory import BatchSpec, needs
    from bitdance.costs.shapes import SHAPES

    settings = {
        "1024×1024, float32": BatchSpec(1024, 1024, dtype="float32", device=kind),
        "1024×1024, bfloat16": BatchSpec(1024, 1024, device=kind),
        "512×512, bfloat16": BatchSpec(512, 512, device=kind),
        "1024×1024, bfloat16, --quantize int8": BatchSpec(1024, 1024, device=kind, quantize="int8"),
        "1024×1024, bfloat16, --quantize int4": BatchSpec(1024, 1024, device=kind, quantize="int4"),
        "512×512, bfloat16, --quantize int4": BatchSpec(512, 512, device=kind, quantize="int4"),
    }
    return {f"14B-64x, {name}": needs(SHAPES["14b-64x"], setting).peak for name, setting in settings.items()}


def _dtypes(device: str) -> dict[str, Any]:
    """The quick dtype of a device and, where bfloat16 is slow, how many times as long as float32 it takes."""
    from bitdance.networks.precision import quick_dtype, slow_bfloat16

    return {"quick_dtype": quick_dtype(device), "bfloat16_times_float32": slow_bfloat16(device)}


def _bfloat16(device: dict[str, Any]) -> str:
    if device["quick_dtype"] == "bfloat16":
        return "bfloat16 is quick (--dtype auto takes it)"
    factor = device["bfloat16_times_float32"]
    slow = f"takes about {factor:.0f} times as long as float32" if factor else "is not quicker than float32"
    return f"bfloat16 {slow}: use float32"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    from bitdance.costs.memory import free_main_memory

    cpu = {
        "device": "cpu",
        "name": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "free_bytes": free_main_memory(),
    }
    devices = [cpu]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, _ = torch.cuda.mem_get_info(index)
            devices.append({"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index), "free_bytes": free})
    elif torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "free_bytes": torch.mps.recommended_max_memory()})
    return devices


def _attention() -> list[str]:
    """Names of the attention backends that this build of torch has, and whether training has the FLASH kernel."""
    import torch

    from bitdance.networks.attention import without_flash

    names = ["sdpa math"]
    if torch.cuda.is_available():
        if torch.backends.cuda.is_flash_attention_available():
            names.append("sdpa flash")
        names.append("sdpa memory-efficient")
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is not None:
        reason = without_flash(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
        names.append(f"flex_attention (no FLASH: {reason})" if reason else "flex_attention with FLASH")
    return names


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
