"""Lookup-free bits against what a user would pick instead, and reconstruction against bits per token.

    python -m stages.measure.compare train runs/compare --train SHARDS… [--part 0/2]     trains what is not trained yet
    python -m stages.measure.compare report runs/compare --heldout SHARDS… [--lpips FILE] [--out docs/tokenizer]

Every run has the same encoder and decoder, the same pictures in the same order, the same number of steps and the same optimiser;
only the bottleneck differs. See configs/compare/README.md for how the pictures are made.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bitdance.jobs.job import parse_shard
from stages.measure.compare_report import report, table
from stages.measure.compare_train import RUNS, Setting, load_pictures, train_one


def _train(arguments: argparse.Namespace) -> None:
    setting = Setting(**json.loads(arguments.setting))
    part, parts = parse_shard(arguments.part)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = [tuple(run.rsplit(":", 1)) for run in arguments.runs] or [(name, str(bits)) for name, bits in RUNS]
    groups = load_pictures([shards.split(",") for shards in arguments.train])
    for name, bits in wanted[part::parts]:
        if not (arguments.folder / f"{name}-{bits}.json").exists():
            train_one(name, int(bits), groups, setting, arguments.folder)
            print(f"{name} {bits} done", flush=True)


def _report(arguments: argparse.Namespace) -> None:
    groups = [shards.split(",") for shards in arguments.heldout]
    print(table(report(arguments.folder, groups, arguments.lpips, arguments.out)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.measure.compare", description="Bottlenecks under equal conditions.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what is not trained yet")
    train.add_argument("folder", type=Path, help="where weights and figures of the runs go")
    train.add_argument("--train", nargs="+", required=True, metavar="SHARDS", help="groups; a comma joins shards of one group")
    train.add_argument("--part", default="0/1", metavar="I/N", help="every N-th run from the I-th: N processes share the work")
    train.add_argument("--runs", nargs="*", default=[], metavar="NAME:BITS", help="only these, for example lfq:16 fsq:16")
    train.add_argument("--setting", default="{}", metavar="JSON", help="fields of Setting to change")
    train.set_defaults(run=_train)
    judge = commands.add_parser("report", help="measure what is trained; write table and plots")
    judge.add_argument("folder", type=Path)
    judge.add_argument("--heldout", nargs=2, required=True, metavar=("PHOTOGRAPHS", "ICONS"), help="shards, commas as above")
    judge.add_argument("--lpips", metavar="FILE", help="weights that `bitdance tokenizer lpips` writes")
    judge.add_argument("--out", type=Path, default=Path("docs/tokenizer"))
    judge.set_defaults(run=_report)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
