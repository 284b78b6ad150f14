"""`bitdance evaluate compare`: figures of several files side by side, those alone that were measured alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdance.cli import Parser, print_json, print_page
from lfq_tokenizer.files import whole_path
from stages.evaluate.figure import Figure, read_figures


def main(argv: Sequence[str]) -> int:
    """A table with a column for each file, and a plot with --plot."""
    parser = Parser(prog="bitdance evaluate compare", description="Figures that `bitdance evaluate score` wrote, side by side.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="files that `bitdance evaluate score -o` wrote")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the figures, too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(list(argv))
    rows = side_by_side({name: read_figures(file) for name, file in zip(_names(arguments.files), arguments.files, strict=True)})
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    if arguments.json:
        print_json({"rows": rows})
    else:
        print_page(table(rows).splitlines())
    return 0


def side_by_side(files: dict[str, list[Figure]]) -> list[dict[str, Any]]:
    """One row for each figure and way of measuring it, with the value of each file that has it."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, figures in files.items():
        for one in figures:
            said = dict(zip(("figure", "evaluator", "features", "reference", "count"), one.conditions, strict=True))
            row = rows.setdefault(one.conditions, {**said, "values": dict.fromkeys(files)})
            row["values"][name] = one.value
    return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown; "–" where a file has no figure that was measured so."""
    files = list(rows[0]["values"]) if rows else []
    lines = [f"| figure | features | reference | pictures | {' | '.join(files)} |", "|---|---|---|---:|" + "---:|" * len(files)]
    for row in rows:
        values = ["–" if value is None else f"{value:.4f}" for value in row["values"].values()]
        lines.append("| " + " | ".join([row["figure"], row["features"], row["reference"], f"{row['count']:,}", *values]) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each figure that at least one file has. ModuleNotFoundError where matplotlib is missing."""
    from matplotlib.figure import Figure as Sheet

    figure = Sheet(figsize=(3 * len(rows), 3.2))
    panels = figure.subplots(1, len(rows), squeeze=False)
    for panel, row in zip(panels[0], rows, strict=True):
        known = {name: value for name, value in row["values"].items() if value is not None}
        panel.bar(list(known), list(known.values()), color="0.4")
        panel.set_title(f"{row['figure']}, {row['count']:,} pictures", fontsize=9)
        panel.tick_params(axis="x", rotation=60, labelsize=8)
    figure.tight_layout()
    with whole_path(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:] or "png", dpi=120)


def _names(files: Sequence[Path]) -> list[str]:
    """Short names that tell the files apart."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]
