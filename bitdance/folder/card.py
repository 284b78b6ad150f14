"""README.md of a model folder: what hubs and people read. Only what the folder says of itself; the rest is said to be unknown.

From `bitdance.json`: `card` (name, what, data, licence, license_id, base_model, language, figures, limits, rebuild, hours,
stages, teacher), `defaults`, `sizes`. A figure is {"what", "value", "command", "date"}.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitdance.folder.parts import HEAD_CONFIG, parameters, part_files
from bitdance.folder.sizes import default_size, rule_of_folder, supported_sizes
from bitdance.folder.stored import open_stored
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.values import shown
from lfq_tokenizer.json_file import read_json

UNKNOWN = "unknown: the folder does not say"


def facts_of(folder: Path) -> dict[str, Any]:
    """What configs and headers of a folder in the published layout say: parts and their parameters, dtypes, sizes."""
    head, rule = HeadConfig.from_dict(read_json(folder / HEAD_CONFIG)), rule_of_folder(folder)
    stored = (held for files in part_files(folder).values() for file in files for held in open_stored(file).values())
    dtypes = {str(held.dtype).removeprefix("torch.") for held in stored}
    return {
        "parts": parameters(folder),
        "dtypes": sorted(dtypes),
        "bits_per_token": head.ch_target,
        "tokens_per_step": head.parallel_num,
        "downsampling": rule.downsampling,
        "default_size": default_size(rule),
        "sizes": supported_sizes(rule),
        "only_these": bool(rule.trained),
    }


def card_text(extras: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card of a model. `extras`: its bitdance.json; `facts`: those of `facts_of` and "format" ("official", "diffusers")."""
    card, diffusers = _checked(extras.get("card", {})), facts.get("format") == "diffusers"
    name, use = str(card.get("name", "BitDance model")), _diffusers_use() if diffusers else _use()
    sections = [
        _header(card, diffusers),
        f"# {name}\n\n{card.get('what', 'A BitDance model: text to picture with binary tokens.')}",
        "## Data and licence\n\n" + f"Data: {card.get('data', UNKNOWN)}.\n\nLicence: {card.get('licence', UNKNOWN)}.",
        "## Model\n\n" + _model(facts),
        "## Use\n\n" + use.replace(EXAMPLE, _example(extras)) + _defaults(extras.get("defaults", {})),
        "## Training\n\n" + _training(card),
        "## Figures\n\n" + _figures(card.get("figures", [])),
        "## Limits\n\n" + _listed(card.get("limits", []), "None were written down; that does not mean that there are none."),
    ]
    return "\n\n".join(sections) + "\n"


_KINDS = {"list": "a list", "dict": "an object", "str": "a text"}


def _checked(card: Any) -> Mapping[str, Any]:
    """The card of a bitdance.json that anyone may have written. ValueError names the key that holds another kind of value."""
    kinds: dict[str, tuple[type, ...]] = {"stages": (list,), "figures": (list,), "limits": (list,), "training": (dict,)}
    kinds["language"] = (str, list)
    if not isinstance(card, Mapping):
        raise ValueError(f"bitdance.json: card = {shown(card)}; an object is allowed")
    for name, allowed in kinds.items():
        if name in card and not isinstance(card[name], allowed):
            words = " or ".join(_KINDS[kind.__name__] for kind in allowed)
            raise ValueError(f"bitdance.json: card.{name} = {shown(card[name])}; {words} is allowed")
    for name, needed in (("stages", ()), ("figures", ("what", "value", "command"))):
        for row in card.get(name, []):
            if not isinstance(row, Mapping) or any(key not in row for key in needed):
                wanted = f"an object with {', '.join(needed)}" if needed else "an object"
                raise ValueError(f"bitdance.json: card.{name} holds {shown(row)}; {wanted} is allowed")
            if not isinstance(row.get("mix") or {}, Mapping):
                raise ValueError(f"bitdance.json: mix = {shown(row['mix'])} in card.{name}; an object is allowed")
    return card


def _header(card: Mapping[str, Any], diffusers: bool) -> str:
    lines = [f"license: {_plain(card.get('license_id', 'unknown'))}", "pipeline_tag: text-to-image"]
    lines.append(f"library_name: {'diffusers' if diffusers else 'bitdance'}")
    if "base_model" in card:
        lines.append(f"base_model: {_plain(card['base_model'])}")
    if language := card.get("language"):
        lines += ["language:", *(f"- {_plain(one)}" for one in ([language] if isinstance(language, str) else language))]
    lines += ["tags:", "- text-to-image", "- bitdance", "- binary-tokens", "- autoregressive"]
    return "\n".join(["---", *lines, "---"])


def _plain(value: Any) -> str:
    """A YAML scalar on one line: quoted where it is not plain word characters."""
    text = " ".join(str(value).split())
    return text if text.replace("-", "").replace(".", "").replace("/", "").replace("_", "").isalnum() else f'"{text}"'


def _model(facts: Mapping[str, Any]) -> str:
    parts: Mapping[str, int] = facts["parts"]
    rows = [f"| {name} | {count:,} |" for name, count in parts.items()] + [f"| all | {sum(parts.values()):,} |"]
    sizes = ", ".join(f"{h}×{w}" for h, w in facts["sizes"])
    side = math.isqrt(facts["tokens_per_step"])
    return (
        "| part | parameters |\n|---|---|\n"
        + "\n".join(rows)
        + f"\n\nWeights: {', '.join(facts['dtypes'])}. {facts['bits_per_token']} bits per token of {facts['downsampling']}×"
        f"{facts['downsampling']} pixels, {facts['tokens_per_step']} tokens ({side}×{side}) per step.\n\n"
        + (f"Sizes: {sizes}." if facts["only_these"] else f"Sizes, among others: {sizes}.")
        + " Default: {}×{} (height × width).".format(*facts["default_size"])
    )


EXAMPLE = "a red house"


def _example(extras: Mapping[str, Any]) -> str:
    """A prompt that the model knows, as a shell and Python can quote it; any text where the folder names none."""
    known = extras.get("prompts")
    listed = list(known.values()) if isinstance(known, dict) else known
    first = next(iter(listed), "") if isinstance(listed, list) else ""
    first = first[0] if isinstance(first, list) and first else first
    text = " ".join(str(first).split())
    return text if isinstance(first, str) and text and not set(text) & set('"\\$`!') else EXAMPLE


def _use() -> str:
    return """```bash
bitdance generate "a red house" --model FOLDER --seed 1 -o out
bitdance verify FOLDER
```

```python
from bitdance import BitDancePipeline

pipe = BitDancePipeline.from_pretrained("FOLDER")
pipe("a red house", seed=1).images[0].save("picture.png")
```"""


def _diffusers_use() -> str:
    return """```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
pipe("a red house", generator=torch.Generator().manual_seed(1)).images[0].save("picture.png")
```

This needs `pip install 'bitdance[diffusers]'`. `trust_remote_code` lets diffusers run `pipeline.py`, which imports the installed
package and nothing else. Without it: `from bitdance_diffusers import BitDanceDiffusionPipeline`, then its
`from_pretrained("FOLDER")`. diffusers wants a folder: of a model on the Hub, `huggingface_hub.snapshot_download` gives it.

Without diffusers:

""" + _use()


def _defaults(defaults: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in defaults.items())
    return f"\n\nDefaults of this model: {said}." if said else ""


def _training(card: Mapping[str, Any]) -> str:
    lines: list[str] = []
    stages: Sequence[Mapping[str, Any]] = card.get("stages", [])
    if stages:
        lines.append("| stage | steps | pictures | mix of resolutions | learning rate | schedule |\n|---|---|---|---|---|---|")
        for stage in stages:
            mix = ", ".join(f"{size}: {share}" for size, share in (stage.get("mix") or {}).items()) or "none"
            numbers = [f"{stage[key]:,}" if isinstance(stage.get(key), int) else UNKNOWN for key in ("steps", "images")]
            cells = [stage.get("name", UNKNOWN), *numbers, mix, stage.get("lr", UNKNOWN), stage.get("schedule", UNKNOWN)]
            lines[-1] += "\n| " + " | ".join(map(str, cells)) + " |"
    else:
        lines.append(f"Stages: {UNKNOWN}.")
    if "teacher" in card:
        lines.append(f"Grown from or taught by: {card['teacher']}.")
    if "hours" in card:
        lines.append(f"Hours: {card['hours']}.")
    if "rebuild" in card:
        lines.append(f"To train it again: `{card['rebuild']}`.")
    if training := card.get("training"):
        lines.append(f"The config is in `bitdance.json` under `card.training` ({len(training)} settings).")
    return "\n\n".join(lines)


def _figures(figures: Sequence[Mapping[str, Any]]) -> str:
    if not figures:
        return "None are recorded in this folder."
    rows = [f"| {row['what']} | {row['value']} | `{row['command']}` | {row.get('date', '')} |" for row in figures]
    return "| figure | value | command | date |\n|---|---|---|---|\n" + "\n".join(rows)


def _listed(lines: Sequence[str], otherwise: str) -> str:
    return "\n".join(f"- {line}" for line in lines) or otherwise
