"""A figure with all that it stands or falls with, as JSON and as a line of a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from bitdance.values import shown
from lfq_tokenizer.files import write_text
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.text import printable
from stages.schema import Table, build


@dataclass(frozen=True)
class Figure:
    """`name` and `value`; `spread` over parts, None where there are none. `evaluator` is the arithmetic, `features` the network
    that looked, `reference` what was compared with, `count` pictures, `order` how they were taken and `seed` of that, `samples`
    where they lay, `model` the fingerprint of what made them ("" where nobody says), `settings` of sampling."""

    name: str
    value: float
    spread: float | None
    evaluator: str
    features: str
    reference: str
    count: int
    order: str
    seed: int | None
    samples: str
    model: str
    settings: Annotated[Mapping[str, Any], Table(others=None)]
    command: str
    date: str

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What must be equal for two values to be compared."""
        return self.name, self.evaluator, self.features, self.reference, self.count


def write_figures(figures: Sequence[Figure], path: Path) -> None:
    """Write them, whole or not at all."""
    write_text(json.dumps({"figures": [asdict(one) for one in figures]}, indent=2, ensure_ascii=False) + "\n", path)


def read_figures(path: Path) -> list[Figure]:
    """FileNotFoundError, or ValueError that names the file, for one that `write_figures` did not write."""
    data = read_json(path)
    rows = data.get("figures") if isinstance(data, dict) else None
    known = {field.name for field in fields(Figure)}
    expected = "a file that `bitdance evaluate score` wrote is expected"
    figures = []
    for row in rows if isinstance(rows, list) and rows else [None]:
        if not isinstance(row, dict) or set(row) != known:
            raise ValueError(f"{path} holds {shown(row)}; {expected}")
        try:
            figures.append(build(Figure, row))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {expected}") from None
    return figures


def table(figures: Sequence[Figure]) -> str:
    """One line for each, as Markdown."""
    lines = ["| figure | value | evaluator | features | reference | pictures | order |", "|---|---:|---|---|---|---:|---|"]
    for one in figures:
        spread = "" if one.spread is None else f" ± {one.spread:.3g}"
        order = one.order if one.seed is None else f"{one.order}, seed {one.seed}"
        cells = [one.name, f"{one.value:.4f}{spread}", one.evaluator, one.features, one.reference, f"{one.count:,}", order]
        lines.append("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
