"""The prompts of a benchmark, from the user's copy of it, and the files that its scripts read.

geneval   evaluation_metadata.jsonl → 00000/metadata.jsonl (that line), 00000/samples/0000.png …
dpg       a folder of ID.txt        → ID.png, a grid of two rows of the pictures of a prompt
hps       a folder of STYLE.json    → STYLE/00000.jpg …
classes   of the model              → samples.npz (ADM's evaluator)

Sources: djghosh13/geneval, TencentQQGYLab/ELLA (dpg_bench), tgxs002/HPSv2.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bitdance.jobs.prompt_file import safe_name
from bitdance.picture import grid, write_png
from bitdance.values import shown
from lfq_tokenizer.files import whole_file
from lfq_tokenizer.json_file import parse_json, read_bytes, read_json
from lfq_tokenizer.text import decoded, text_lines

JPEG = {"quality": 95, "subsampling": 0}  # OURS: HPSv2 reads .jpg and does not say of which quality
PROMPT_BYTES, LIST_BYTES = 1 << 20, 1 << 28


@dataclass(frozen=True)
class Item:
    """One prompt of a set: `id` names its pictures, `place` its file or folder in the benchmark's layout, `more` what else the
    layout wants."""

    id: str
    prompt: str
    place: str
    more: str = ""


@dataclass(frozen=True)
class Benchmark:
    """`items(source)` reads the user's copy, `lay_out(item, pictures, folder)` writes the files of one prompt; `pictures` of a
    prompt where nobody says another number."""

    items: Callable[[Path], list[Item]]
    lay_out: Callable[[Item, Sequence[Path], Path], None]
    pictures: int


def _geneval_items(source: Path) -> list[Item]:
    items: list[Item] = []
    for number, line in enumerate(text_lines(decoded(read_bytes(source, LIST_BYTES), str(source))), 1):
        if line.strip():
            where, name = f"{source} line {number}", f"{len(items):05d}"
            items.append(Item(name, _prompt(parse_json(line, where), where), name, line.strip()))
    return _some(items, source)


def _geneval_files(item: Item, pictures: Sequence[Path], folder: Path) -> None:
    place = folder / item.place
    (place / "samples").mkdir(parents=True, exist_ok=True)
    for k, picture in enumerate(pictures):
        _copy(picture, place / "samples" / f"{k:04d}.png")
    with whole_file(place / "metadata.jsonl") as file:
        file.write((item.more + "\n").encode())


def _dpg_items(source: Path) -> list[Item]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder; give the folder of prompts of DPG-Bench, one .txt each")
    files = sorted(source.glob("*.txt"))
    prompts = (decoded(read_bytes(file, PROMPT_BYTES), str(file)).strip() for file in files)
    named = zip(files, prompts, strict=True)
    return _some([Item(safe_name(file.stem, str(file)), prompt, f"{file.stem}.png") for file, prompt in named], source)


def _dpg_files(item: Item, pictures: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = -(-len(pictures) // 2) if len(pictures) > 1 else 1
    write_png(grid([_opened(path) for path in pictures], columns, gap=0), folder / item.place)


def _hps_items(source: Path) -> list[Item]:
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    styles: dict[str, Any] = {}
    for file in files:
        data = read_json(file)
        styles |= data if isinstance(data, dict) else {file.stem.removeprefix("benchmark_"): data}
    items = []
    for style, prompts in styles.items():
        if not isinstance(prompts, list) or not all(isinstance(one, str) for one in prompts):
            raise ValueError(
                f"{source}: {shown(style)} is no list of prompts; give HPSv2's files, a list of prompts for each style"
            )
        if safe_name(style, f"{source}: style") != style:
            raise ValueError(f"{source}: style {shown(style)}; a name for a folder is allowed: letters, digits, - and _")
        names = (safe_name(f"{style}-{k:05d}", str(source)) for k in range(len(prompts)))
        items += [Item(name, prompt, f"{style}/{k:05d}.jpg") for k, (name, prompt) in enumerate(zip(names, prompts, strict=True))]
    return _some(items, source)


def _hps_files(item: Item, pictures: Sequence[Path], folder: Path) -> None:
    target = folder / item.place
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        _opened(pictures[0]).save(file, "JPEG", **JPEG)


BENCHMARKS = {
    "geneval": Benchmark(_geneval_items, _geneval_files, 4),
    "dpg": Benchmark(_dpg_items, _dpg_files, 4),
    "hps": Benchmark(_hps_items, _hps_files, 1),
}


def request_lines(items: Sequence[Item], pictures: int, seed: int) -> str:
    """The set as `bitdance generate --prompts` reads it; every picture has a seed of its own, from `seed` on."""
    rows = ({"id": item.id, "prompt": item.prompt, "seed": seed + k * pictures, "n": pictures} for k, item in enumerate(items))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _prompt(data: Any, source: str) -> str:
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise ValueError(f"{source}: {shown(data)}; an object with a prompt is expected")
    return str(data["prompt"])


def _some(items: list[Item], source: Path) -> list[Item]:
    if not items:
        raise ValueError(f"{source} holds no prompts; give the user's copy of the benchmark")
    return items


def _opened(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as picture:
        return picture.convert("RGB")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, whole_file(target) as file:
        shutil.copyfileobj(reading, file)
