"""`bitdance card`: figures into the README.md of a model folder, as the field's hubs read them and as a table for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from bitdance.cli import Parser, print_page
from lfq_tokenizer.files import write_text
from lfq_tokenizer.text import decoded, printable
from stages.evaluate.figure import Figure, read_figures, table

TITLE, AFTER = "## Evaluation", "\n## "


def main(argv: Sequence[str]) -> int:
    """Write them; what an earlier call wrote is replaced, the rest of the card stays."""
    parser = Parser(
        prog="bitdance card", description="Write figures of `bitdance evaluate score` into the model card of a folder."
    )
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FIGURES.json", help="files that `bitdance evaluate score -o` wrote"
    )
    arguments = parser.parse_args(list(argv))
    if not arguments.model.is_dir():
        raise FileNotFoundError(f"{arguments.model} is no folder; give a model folder")
    figures = [one for file in arguments.files for one in read_figures(file)]
    path = arguments.model / "README.md"
    text = decoded(path.read_bytes(), str(path)) if path.is_file() else f"---\n---\n# {arguments.model.resolve().name}\n"
    try:
        card = with_figures(text, figures, arguments.model.resolve().name)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{path}: the settings between the lines --- are not readable ({error}); mend or remove them") from None
    write_text(card, path)
    print_page([f"{len(figures)} figures in {path}"])
    return 0


def with_figures(text: str, figures: Sequence[Figure], name: str) -> str:
    """The card with these figures and no others."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    data.model_name = getattr(data, "model_name", None) or name
    data.eval_results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="custom",
            dataset_name=f"{one.reference}, {one.count} pictures",
            metric_type=one.name.lower().replace(" ", "_"),
            metric_value=one.value,
            metric_name=f"{one.name} ({one.features}; {one.evaluator}; {one.order})",
        )
        for one in figures
    ]
    body = card.text
    if TITLE in body:
        before, _, rest = body.partition(TITLE)
        body = before + (rest[rest.index(AFTER) + 1 :] if AFTER in rest else "")
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(printable(one.command) for one in figures))
    card.text = f"{body.rstrip()}\n\n{TITLE}\n\n{table(figures)}\n\n{commands}\n"
    return str(card)
