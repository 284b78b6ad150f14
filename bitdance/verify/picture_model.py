"""What `bitdance info` and `bitdance verify` say of a folder with one network beside the picture tokenizer."""

from pathlib import Path
from typing import Any

from bitdance.folder.parts import TOKENIZER_CONFIG, count_parameters, file_sizes
from bitdance.folder.picture_model import CLASSES, NETWORK, TEXT_ENCODER, TOKENIZER, Layout
from bitdance.verify.compare import compared
from bitdance.verify.examine import TOKENIZERS, TensorLocation, examined
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import read_shapes


def info(layout: Layout[Any], folder: Path) -> dict[str, Any]:
    """Facts told from configs and headers."""
    found = layout.check(folder)
    parts, files = {part: count_parameters(folder / file) for part, file in layout.files.items()}, file_sizes(folder)
    names = found.names
    classes: dict[str, Any] = {} if names is None else {"class_count": len(names)}
    if names is not None:
        classes["classes"] = {str(number): ", ".join(entry.names) for number, entry in enumerate(names.entries)}
    if found.config.text_width is not None:
        files |= {f"{TEXT_ENCODER}/{name}": size for name, size in file_sizes(folder / TEXT_ENCODER).items()}
    return {
        "kind": layout.kind,
        "published": None if found.config.known is None else found.config.known[0],
        "parameters": sum(parts.values()),
        "parts": parts,
        "bits_per_token": found.config.bits,
        "downsampling": found.tokenizer.downsampling,
        "default_size": found.sizes[0],
        "sizes": found.sizes,
        **classes,
        "defaults": found.extras.get("defaults", {}),
        "card": found.extras.get("card", {}),
        "fingerprint": layout.fingerprint(folder),
        "bytes": sum(files.values()),
        "files": files,
    }


def examine(layout: Layout[Any], folder: Path, own: Path | None = None) -> dict[str, Any]:
    """Structure, shapes, parameter counts, values and hashes; see `bitdance.verify.examine`."""
    problems: list[str] = []
    known: dict[str, tuple[str, int]] = {}
    try:
        found = layout.check(folder)
        if found.config.known is not None:
            known[NETWORK] = found.config.known
        if found.tokenizer in TOKENIZERS:
            known[TOKENIZER] = TOKENIZERS[found.tokenizer]
    except (ValueError, OSError) as error:
        problems.append(str(error))
    spare = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in layout.files.values())
    warnings = [f"no part reads {listed(spare, ', ')}"] if spare else []
    files = {part: [folder / file] for part, file in layout.files.items()}
    return {"kind": layout.kind, **examined(folder, own, files, known, problems, warnings, layout.fingerprint)}


def compare(layout: Layout[Any], folder: Path, other: Path) -> dict[str, Any]:
    """Two folders, tensor by tensor; see `bitdance.verify.compare`. Names of classes that differ show among the configs."""
    places = [
        {
            (part, name): TensorLocation(part, name, one / file)
            for part, file in layout.files.items()
            for name in read_shapes(one / file)
        }
        for one in (folder, other)
    ]
    names = (layout.config_file, TOKENIZER_CONFIG, CLASSES)
    configs = [name for name in names if all((one / name).is_file() for one in (folder, other))]
    return {**compared(folder, other, places[0], places[1], configs), "texts_that_differ": []}
