"""What `bitdance info` and `bitdance verify` say of a folder with a class-conditional model."""

from pathlib import Path
from typing import Any

from bitdance.folder.fingerprint import fingerprint_of
from bitdance.folder.parts import TOKENIZER_CONFIG, count_parameters, file_sizes
from bitdance.folder.stored import open_stored
from bitdance.kinds.class_patch.config import ClassPatchConfig, published_name
from bitdance.kinds.class_patch.folder import CLASSES, CONFIG, KIND, WEIGHTS, check_folder
from bitdance.verify.compare import compared
from bitdance.verify.examine import TOKENIZERS, TensorLocation, examined
from lfq_tokenizer import TokenizerConfig
from lfq_tokenizer.json_file import read_config
from lfq_tokenizer.text import listed
from lfq_tokenizer.tokenizer import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from lfq_tokenizer.weights import read_shapes

NETWORK, TOKENIZER = "generator", "tokenizer"
FILES = {NETWORK: WEIGHTS, TOKENIZER: TOKENIZER_WEIGHTS}
PUBLISHED_CLASSES = 1000
# network and head, told from the published shapes; the README of the published code rounds them to 242M, 260M, 527M and 1.0B
COUNTS = {"B-1x": 242_373_152, "B-4x": 260_102_432, "B-16x": 260_111_648, "L-1x": 527_271_968, "H-1x": 1_007_960_352}


def info(folder: Path) -> dict[str, Any]:
    """Facts told from configs and headers."""
    found = check_folder(folder)
    parts, files = {part: count_parameters(folder / file) for part, file in FILES.items()}, file_sizes(folder)
    return {
        "kind": KIND,
        "published": published_name(found.config),
        "parameters": sum(parts.values()),
        "parts": parts,
        "bits_per_token": found.config.latent_dim,
        "downsampling": found.tokenizer.downsampling,
        "tokens_per_step": found.config.parallel_num,
        "default_size": (found.side, found.side),
        "sizes": [(found.side, found.side)],
        "class_count": len(found.names),
        "classes": {str(number): ", ".join(entry.names) for number, entry in enumerate(found.names.entries)},
        "defaults": found.extras.get("defaults", {}),
        "card": found.extras.get("card", {}),
        "fingerprint": fingerprint(folder),
        "bytes": sum(files.values()),
        "files": files,
    }


def examine(folder: Path, own: Path | None = None) -> dict[str, Any]:
    """Structure, shapes, parameter counts, values and hashes; see `bitdance.verify.examine`."""
    problems: list[str] = []
    known: dict[str, tuple[str, int]] = {}
    try:
        check_folder(folder)
        config = read_config(folder / CONFIG, ClassPatchConfig.from_dict)
        if (name := published_name(config)) and config.num_classes == PUBLISHED_CLASSES:
            known[NETWORK] = f"BitDance-{name}", COUNTS[name]
        tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
        if tokenizer in TOKENIZERS:
            known[TOKENIZER] = TOKENIZERS[tokenizer]
    except (ValueError, OSError) as error:
        problems.append(str(error))
    spare = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in (WEIGHTS, TOKENIZER_WEIGHTS))
    warnings = [f"no part reads {listed(spare, ', ')}"] if spare else []
    files = {part: [folder / file] for part, file in FILES.items()}
    return {"kind": KIND, **examined(folder, own, files, known, problems, warnings, fingerprint)}


def compare(folder: Path, other: Path) -> dict[str, Any]:
    """Two folders, tensor by tensor; see `bitdance.verify.compare`. Names of classes that differ show among the configs."""
    places = [
        {(part, name): TensorLocation(part, name, one / file) for part, file in FILES.items() for name in read_shapes(one / file)}
        for one in (folder, other)
    ]
    configs = [name for name in (CONFIG, TOKENIZER_CONFIG, CLASSES) if all((one / name).is_file() for one in (folder, other))]
    return {**compared(folder, other, places[0], places[1], configs), "texts_that_differ": []}


def fingerprint(folder: Path) -> str:
    """16 hex digits of the weights and of what else decides pictures; names of classes and settings of training do not count."""
    tensors = {part: open_stored(folder / file) for part, file in FILES.items()}
    config = read_config(folder / CONFIG, ClassPatchConfig.from_dict)
    tokenizer = read_config(folder / TOKENIZER_CONFIG, TokenizerConfig.from_published)
    decides = ("n_head", "parallel_num", "parallel_mode", "time_shift")  # the others show in the shapes
    return fingerprint_of(tensors, {**{name: getattr(config, name) for name in decides}, TOKENIZER: tokenizer.to_published()})
