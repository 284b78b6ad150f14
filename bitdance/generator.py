"""Which way of generating a model folder holds, and the one door to all of them.

    pipe = load_pipeline("folder")        # or "demo"
    pipe.kind, pipe(…).images

A kind is a package of `bitdance.kinds` whose `__init__` offers what the rest of the house asks for, each loading its own part
only when it is called:

    load_pipeline(folder, device, dtype, **options) → a pipeline        a model folder of this kind
    rules(folder) → conditions, sizes, settings, and how to load        `bitdance generate`
    sizes(folder) → facts                                               `bitdance sizes`
    info(folder) → facts                                                `bitdance info`
    examine(folder) → facts with "problems" and "warnings"              `bitdance verify`
    compare(folder, other) → facts                                      `bitdance verify --against`
    bench(options) → facts, and as text                                 `bitdance bench`
    EDITS, edit_settings(pipe, preset, said)   (kinds that can)         `bitdance edit`
    batch_needs(options) → facts                                        `bitdance doctor --model`

`bitdance.json` of a folder names its kind; a folder that names none is of the first. Nothing else asks which kind it has.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from bitdance.values import shown
from lfq_tokenizer.files import check_links

KINDS = {
    "next_patch": "bitdance.kinds.next_patch",
    "class_patch": "bitdance.kinds.class_patch",
    "refine": "bitdance.kinds.refine",
    "next_scale": "bitdance.kinds.next_scale",
}
DEFAULT = "next_patch"
# family of published files → the module that converts them, with PARTS and convert(file, out, parts) → facts
FAMILIES = {"imagenet": f"{KINDS['class_patch']}.convert", "grn": f"{KINDS['refine']}.convert"} | dict.fromkeys(
    ("var", "infinity"), f"{KINDS['next_scale']}.convert"
)


def kind_of(folder: Path | str) -> str:
    """The kind of a model folder ("demo" is the bundled one). FileNotFoundError where there is no folder, ValueError where its
    `bitdance.json` names a kind that is not known."""
    from bitdance.folder.parts import EXTRAS_FILE, read_extras  # torch only now: commands read this file for their --help

    if str(folder) == "demo":
        return DEFAULT
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no model folder {str(folder)!r} (looked for {path.absolute()}); a model is a local folder. "
            '"demo" names the bundled model.'
        )
    check_links(path)
    kind = read_extras(path).get("kind", DEFAULT)
    if not isinstance(kind, str) or kind not in KINDS:
        source = path / EXTRAS_FILE
        raise ValueError(f'{source}: "kind" = {shown(kind)}; known are {", ".join(KINDS)}; a newer bitdance may know it')
    return kind


def module_of(folder: Path | str) -> Any:
    """The package of a folder's kind, which offers what is listed above."""
    return import_module(KINDS[kind_of(folder)])


def settings_beside(rules: Any) -> dict[str, Any]:
    """The settings of a model beside steps and guidance, each with the value of a picture that does not say it. `rules` are those
    of its folder."""
    plain = type(rules.sampling({}, None, False))()
    said = ("preset", "num_inference_steps", "guidance_scale")
    return {name: value for name, value in plain.arguments().items() if name not in said}


def load_pipeline(folder: Path | str, device: Any = None, dtype: Any = None, **options: Any) -> Any:
    """A pipeline for a model folder of any kind, or for "demo", the bundled model. Nothing is downloaded.

    `device=None` is CUDA where there is one, else CPU; `dtype=None` is bfloat16 on CUDA, float32 elsewhere. `options` are those
    of the kind (`quantize`, `lora`, … of text models). The pipeline says its `kind`; calling it makes pictures
    (`pipe("a prompt")` or `pipe(class_label=207)`), `encode` and `decode` turn pictures into tokens and back.
    FileNotFoundError or ValueError name the file that is missing, broken or does not fit.
    """
    return module_of(folder).load_pipeline(folder, device, dtype, **options)
