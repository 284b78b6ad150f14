"""Ways of predicting the same pictures, trained with equal numbers of operations and measured alike.

    python -m stages.measure.evidence run configs/evidence/ways.toml [--part 0/2] [--smoke]
    python -m stages.measure.evidence report configs/evidence/ways.toml --out docs/evidence

A study names ways, each a training config with changes and how it is sampled. Every way is trained once for each seed, for as
many steps as the study's operations allow (those of the network, forward and backward, as `--dry-run` counts them; encoding
pictures is not in them) or until it has seen the study's `samples`, and measured by `bitdance measure classes`. What is done is
not done again, and training goes on where it was stopped; `--done` takes over what an earlier report says. `--part I/N` takes
every N-th run, for processes side by side; `--smoke` is the whole way in minutes, with the study's own small numbers: its figures
mean nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdance.cli import Parser, print_page
from bitdance.jobs.job import parse_shard
from lfq_tokenizer.files import write_text
from lfq_tokenizer.json_file import write_json
from stages.measure.evidence.report import plot, read_results, report, write_pictures
from stages.measure.evidence.run import run, take_over
from stages.measure.evidence.study import read_study


def main(argv: Sequence[str] | None = None) -> int:
    """Run or report a study."""
    parser = Parser(prog="python -m stages.measure.evidence", description="Ways of predicting the same pictures, compared.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and measure what is not done yet")
    telling = commands.add_parser("report", help="table and plot of what is done")
    for command in (running, telling):
        command.add_argument("study", type=Path, help="a study of configs/evidence")
        command.add_argument("--smoke", action="store_true", help="the study in small, to see that all of it works")
    running.add_argument("--part", default="0/1", metavar="I/N")
    running.add_argument("--done", type=Path, help="a report's .json: its results count as done, wherever they were found")
    telling.add_argument("--out", type=Path, help="folder for NAME.md, .json and .png, and pictures of every way")
    arguments: argparse.Namespace = parser.parse_args(argv)
    study = read_study(arguments.study, arguments.smoke)
    if arguments.command == "run":
        if arguments.done is not None:
            take_over(study, arguments.done)
        run(study, parse_shard(arguments.part))
        return 0
    results = read_results(study)
    if not results:
        raise ValueError(f"{study.out} holds no results; start with: python -m stages.measure.evidence run {arguments.study}")
    text = report(results)
    print_page(text.splitlines())
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = arguments.study.stem
        write_text(text + "\n", arguments.out / f"{name}.md")
        write_json({"study": study.title, "results": results}, arguments.out / f"{name}.json")
        plot(results, arguments.out / f"{name}.png")
        if study.pictures:
            write_pictures(study, arguments.out / f"{name}-pictures.png")
    return 0


if __name__ == "__main__":
    from stages.command import guarded

    sys.exit(guarded("python -m stages.measure.evidence", main, None))
