"""Copies of the recorded model as a stranger may have changed them."""

import json
import shutil
from pathlib import Path
from typing import Any

from lfq_tokenizer.json_file import read_json

GOLDEN = Path(__file__).parent / "golden" / "t2i_ckpt"
SMALL = ["--height", "64", "--width", "64", "--steps", "1", "--guidance", "1", "--device", "cpu"]


def golden(folder: Path) -> Path:
    """A copy in the new folder."""
    return Path(shutil.copytree(GOLDEN, folder))


def change(folder: Path, file: str, **values: Any) -> None:
    """Other values of some keys of a JSON file, which may be new."""
    path = folder / file
    before = read_json(path) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))
