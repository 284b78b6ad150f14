"""The folder of a picture tokenizer of whichever architecture: `ae_config.json` and `ae.safetensors` (published layout)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lfq_tokenizer.files import check_links
from lfq_tokenizer.json_file import read_config, write_json
from lfq_tokenizer.weights import check_depth, check_shapes, read_safetensors, read_shapes, write_safetensors

CONFIG_FILE = "ae_config.json"
WEIGHTS_FILE = "ae.safetensors"
DEMO = Path(__file__).parent.parent / "bitdance" / "pretrained" / "demo"  # of the same distribution
T = TypeVar("T", bound=nn.Module)


def read_folder(build: Callable[[Any], T], config_of: Callable[[Any], Any], folder: Path | str) -> T:
    """The tokenizer of a folder, or of "demo", the bundled model, in eval mode; the dtype on disk is that of the module.

    FileNotFoundError or ValueError name the file and, for wrong tensors, the first ten offenders.
    """
    folder = DEMO if str(folder) == "demo" else Path(folder)
    if folder.is_dir():
        check_links(folder)
    config, weights = read_config(folder / CONFIG_FILE, config_of), folder / WEIGHTS_FILE
    found = read_shapes(weights)
    check_depth(config.layers, found, weights)
    with torch.device("meta"):
        tokenizer = build(config)
    check_shapes({name: tuple(t.shape) for name, t in tokenizer.state_dict().items()}, found, weights)
    tokenizer.load_state_dict(read_safetensors(weights), strict=True, assign=True)
    return tokenizer.eval()


def write_folder(tokenizer: Any, folder: Path | str) -> None:
    """Write both files; each appears whole or not at all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(tokenizer.config.to_published(), Path(folder) / CONFIG_FILE)
    write_safetensors(tokenizer.state_dict(), Path(folder) / WEIGHTS_FILE)
