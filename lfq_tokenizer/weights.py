"""Tensors in and out of safetensors: strict, atomic, with errors that name the file. Nothing here can execute code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lfq_tokenizer.files import whole_path
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.text import listed

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def read_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a file of weights, from the header only. ValueError for tensors of other than
    floating point numbers."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        odd = [f"{name} ({held.get_dtype()})" for name, held in slices.items() if held.get_dtype() not in FLOATS]
        if odd:
            raise ValueError(f"{path} holds {listed(odd)}; weights are floating point numbers: {', '.join(FLOATS)}")
        return {name: tuple(held.get_shape()) for name, held in slices.items()}


def read_weight_map(index: Path | str) -> dict[str, str]:
    """Tensor → file, as an index of several files says. ValueError where it names anything but files beside itself."""
    said = read_json(index)
    weight_map = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} holds no weight_map; download or export it again")
    for name in dict.fromkeys(map(str, weight_map.values())):
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} points to {name!r:.200}; only .safetensors files beside it, in the same folder, are read")
    return {tensor: str(name) for tensor, name in weight_map.items()}


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU, in the dtype on disk. Broken files raise ValueError with the file's name."""
    with _opened(path):
        pass
    return load_file(str(path))


def _opened(path: Path | str) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder in the published layout holds it")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}); download or export it again"
        ) from error


def write_safetensors(state: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically: the file is either the old one or the whole new one. `metadata` goes into its header."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    with whole_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt", **(metadata or {})})


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Path | str) -> None:
    """ValueError listing the first ten names that are missing, unexpected or of another shape."""
    problems = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    problems += [f"unexpected {name} {list(found[name])}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit its config: {listed(problems)}. Weights and config must come from the same model."
        )


def check_depth(layers: int, found: Mapping[str, object], source: Path | str) -> None:
    """ValueError, before any layer is built, for a config of more layers than the file of its weights has tensors."""
    if layers > len(found):
        text = f"{source} holds {len(found)} tensors and its config asks for {layers} layers"
        raise ValueError(f"{text}. Weights and config must come from the same model.")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load exactly these tensors into `module`, which keeps its own dtype and device. Any difference is an error."""
    check_shapes(
        {name: tuple(t.shape) for name, t in module.state_dict().items()},
        {name: tuple(t.shape) for name, t in state.items()},
        source,
    )
    module.load_state_dict(dict(state), strict=True)
