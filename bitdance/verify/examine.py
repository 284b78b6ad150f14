"""One model folder: structure, shapes, parameter counts, values, hashes. Read tensor by tensor; no model is built."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitdance.costs.shapes import SHAPES
from bitdance.folder.config import check_folder
from bitdance.folder.fingerprint import fingerprint
from bitdance.folder.parts import (
    HEAD,
    HEAD_CONFIG,
    LM_CONFIG,
    LM_INDEX,
    LM_WEIGHTS,
    PROJECTOR,
    STEMS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    part_files,
    weight_files,
)
from bitdance.folder.stored import PIECE
from bitdance.heads.diffusion.network import HeadConfig
from lfq_tokenizer import TokenizerConfig
from lfq_tokenizer.files import sha256
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import read_shapes, read_weight_map

_TABLES = ("embed_tokens", "lm_head")  # their rows are the vocabulary, which differs between models of one shape
_BACKBONE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_HEAD = ("ch_target", "ch_cond", "ch_latent", "depth_latent", "depth_adanln", "use_swiglu")
_SIX_LEVELS = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4, 8), "gan_decoder": True}
# Counts of the published models: backbone from Qwen3-14B's 14,768,307,200 less 2 × 151,936 × 5,120; head, projector and d16c32
# from the sizes of their files; the two 32× tokenizers from their configs.
TOKENIZERS = {
    TokenizerConfig(): ("d16c32", 460_294_179),
    TokenizerConfig(**_SIX_LEVELS, z_channels=128): ("d32c128", 421_382_275),  # type: ignore[arg-type]
    TokenizerConfig(**_SIX_LEVELS, z_channels=256): ("d32c256", 424_691_971),  # type: ignore[arg-type]
}
BACKBONE_14B, HEAD_14B, PROJECTOR_14B = 13_212_482_560, 1_758_464_032, 26_388_480


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies."""

    part: str
    name: str
    file: Path


def examine(folder: Path, own: Path | None = None) -> dict[str, Any]:
    """What `bitdance verify --json` says of one folder. "problems" make a model unusable or wrong, "warnings" are worth a look;
    both are lists of sentences. Files that can be read are looked at even when others are missing or broken. `own`: the folder as
    the user has it, where `folder` is a view of it in the published layout; its files are hashed.
    """
    problems, warnings = _structure(folder)
    return examined(folder, own, _files(folder), _published(folder), problems, warnings, fingerprint)


def examined(
    folder: Path,
    own: Path | None,
    files: Mapping[str, list[Path]],
    known: Mapping[str, tuple[str, int]],
    problems: list[str],
    warnings: list[str],
    mark: Callable[[Path], str],
) -> dict[str, Any]:
    """The facts of `examine` about a folder of any kind. `files` of each part; `known`: part → (name, parameters) of the
    published model that its config describes; `mark`: its fingerprint. Problems and warnings found before stand first."""
    places = list(_readable(files, problems))
    constant: list[str] = []
    odd: list[dict[str, Any]] = []
    dtypes: dict[str, Counter[str]] = {}
    for place, tensor in _tensors(places):
        dtypes.setdefault(place.part, Counter())[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        low, high, wrong = value_range(tensor)
        if wrong:
            odd.append({"part": place.part, "name": place.name, "numbers": wrong, "of": tensor.numel()})
        elif low == high and tensor.numel() > 1:
            constant.append(f"{place.part} {place.name} = {low:g}")
    if odd:
        rows = [f"{row['part']} {row['name']} ({row['numbers']:,} of {row['of']:,})" for row in odd]
        problems.append(f"{len(odd)} tensors hold NaN or infinity: {listed(rows, ', ')}")
    if constant:
        warnings.append(f"{len(constant)} tensors hold one number only: {listed(constant, ', ')}")
    networks = {name: {**facts, "dtypes": dict(dtypes.get(name, {}))} for name, facts in _parts(places, known).items()}
    for name, facts in networks.items():
        if facts["published"] and not facts["published"]["equal"]:
            problems.append(
                f"{name} has {facts['published']['counted']:,} parameters, the published {facts['published']['name']} "
                f"{facts['published']['parameters']:,}"
            )
    return {
        "model": folder.name,
        "problems": problems,
        "warnings": warnings,
        "parameters": sum(facts["parameters"] for facts in networks.values()),
        "parts": networks,
        "tensors": len(places),
        "not_finite": odd,
        "constant": constant,
        "files": {
            path.relative_to(own or folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted((own or folder).rglob("*"))
            if path.is_file() and (len(path.relative_to(own or folder).parts) <= 2 or not path.is_symlink())  # see check_links
        },
        "fingerprint": _mark(folder, mark),
    }


def _mark(folder: Path, mark: Callable[[Path], str]) -> str:
    try:
        return mark(folder)
    except (ValueError, OSError):  # of a file whose fault stands among the problems
        return "unknown"


def value_range(tensor: Tensor) -> tuple[float, float, int]:
    """(least, greatest, how many are NaN or infinite), a piece at a time."""
    low, high, wrong = math.inf, -math.inf, 0
    for piece in tensor.reshape(-1).split(PIECE) if tensor.numel() else ():
        piece = piece if piece.dtype == torch.float64 else piece.float()
        least, greatest = (float(value) for value in piece.aminmax())  # NaN goes through
        low, high = min(low, least), max(high, greatest)
        if not (math.isfinite(least) and math.isfinite(greatest)):
            wrong += int((~piece.isfinite()).sum())
    return low, high, wrong


def places_of(folder: Path) -> dict[tuple[str, str], TensorLocation]:
    """(part, name) → where it lies, for every tensor of a folder that `check_folder` accepts."""
    return {
        (part, name): TensorLocation(part, name, file)
        for part, files in part_files(folder).items()
        for file in files
        for name in read_shapes(file)
    }


def _structure(folder: Path) -> tuple[list[str], list[str]]:
    """What is wrong with files, configs and shapes, told from headers; what is odd about them."""
    problems: list[str] = []
    warnings: list[str] = []
    try:
        files = {file for listed_files in part_files(folder).values() for file in listed_files if file.is_file()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        files = set()  # a file is missing or broken, which check_folder says better
    try:
        check_folder(folder)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if (folder / LM_INDEX).is_file() and not problems:
        problems += _index(folder)
        if (folder / LM_WEIGHTS).is_file():
            warnings.append(f"{LM_INDEX} is not read, because there is {LM_WEIGHTS}")
    spare = sorted(path.name for path in folder.glob("*.safetensors") if files and path not in files)
    if spare:
        warnings.append(f"no part reads {listed(spare, ', ')}")
    return problems, warnings


def _index(folder: Path) -> list[str]:
    """Tensors that do not lie in the file where the index says."""
    if (folder / LM_WEIGHTS).is_file():
        return []
    said = read_weight_map(folder / LM_INDEX)
    found = {name: file for file in sorted(set(said.values())) for name in read_shapes(folder / file)}
    wrong = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
    return [f"{LM_INDEX} names the wrong file for {listed(wrong, ', ')}"] if wrong else []


def _readable(parts_of: Mapping[str, list[Path]], problems: list[str]) -> Iterator[TensorLocation]:
    """Tensors of the files that are there and whole; a missing or broken one has been told of, or is now."""
    for name, files in parts_of.items():
        for file in files:
            try:
                yield from (TensorLocation(name, tensor, file) for tensor in read_shapes(file))
            except (ValueError, OSError) as error:
                if not any(file.name in problem for problem in problems):
                    problems.append(str(error))


def _files(folder: Path) -> dict[str, list[Path]]:
    """Part → its files, also where the folder is incomplete."""
    try:
        return part_files(folder)
    except (ValueError, KeyError, TypeError, AttributeError):  # of the backbone's index, which has been told of
        return {part: weight_files(folder, STEMS[part]) for part in (HEAD, PROJECTOR, TOKENIZER)}


def _tensors(places: list[TensorLocation]) -> Iterator[tuple[TensorLocation, Tensor]]:
    """One after the other, mapped from its file."""
    by_file: dict[Path, list[TensorLocation]] = {}
    for place in places:
        by_file.setdefault(place.file, []).append(place)
    for file, inside in by_file.items():
        with safe_open(str(file), framework="pt") as opened:
            for place in inside:
                yield place, opened.get_tensor(place.name)


def _parts(places: list[TensorLocation], known: Mapping[str, tuple[str, int]]) -> dict[str, dict[str, Any]]:
    shapes = {file: read_shapes(file) for file in {place.file for place in places}}
    counts: dict[str, Counter[bool]] = {}  # by whether the tensor is a table of the vocabulary
    for place in places:
        table = any(word in place.name for word in _TABLES)
        counts.setdefault(place.part, Counter())[table] += math.prod(shapes[place.file][place.name])
    facts: dict[str, dict[str, Any]] = {}
    for part, count in counts.items():
        own = count[False] if part == "backbone" else count.total()
        published = None
        if part in known:
            name, number = known[part]
            published = {"name": name, "parameters": number, "counted": own, "equal": own == number}
        facts[part] = {"parameters": count.total(), "published": published}
    return facts


def _published(folder: Path) -> dict[str, tuple[str, int]]:
    """Part → (name, parameters) of the published model that its config describes. Of a backbone without its vocabulary."""
    shape = SHAPES["14b-64x"]
    known: dict[str, tuple[str, int]] = {}
    try:
        head = HeadConfig.from_dict(read_json(folder / HEAD_CONFIG))
        lm: Mapping[str, Any] = read_json(folder / LM_CONFIG)
        tokenizer = TokenizerConfig.from_published(read_json(folder / TOKENIZER_CONFIG))
        kind = lm.get("model_type")
    except (ValueError, OSError, TypeError, KeyError, AttributeError):
        return {}  # told of in _structure
    if kind == "qwen3" and all(lm.get(name) == shape.backbone[name] for name in _BACKBONE):
        known["backbone"] = "Qwen3-14B without its vocabulary", BACKBONE_14B
    if all(getattr(head, name) == getattr(shape.head, name) for name in _HEAD):
        known["head"] = f"14B-{head.parallel_num}x", HEAD_14B
    if (head.ch_target, head.ch_cond) == (shape.head.ch_target, shape.head.ch_cond):
        known["projector"] = "14B", PROJECTOR_14B
    if tokenizer in TOKENIZERS:
        known["tokenizer"] = TOKENIZERS[tokenizer]
    return known
