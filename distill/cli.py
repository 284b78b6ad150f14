"""`bitdance distill CONFIG`: train a student; or write, for it, the teacher's pictures or predictions.

bitdance distill CONFIG [--set a.b=c …] [--resume auto|PATH|no] [--dry-run]
bitdance distill CONFIG --write-samples FOLDER [--count N] [--shard I/N]
bitdance distill CONFIG --write-targets FOLDER [--count N] [--shard I/N]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stages.cli import training_parser
from stages.command import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for bad usage, 128 + signal when stopped."""
    return guarded("bitdance distill", _distill, argv)


def _distill(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)

    from stages.config import read_values

    if read_values(arguments.config, arguments.set).get("recipe") in ("few_steps", "few_steps_class"):
        return _few_steps(arguments)

    from distill.config import load_config

    config = load_config(arguments.config, arguments.set)
    if arguments.dry_run:
        from distill.plan import show

        return show(config, arguments)
    if arguments.write_samples or arguments.write_targets:
        from bitdance.jobs.job import parse_shard
        from distill.writing import WriteSpec, write

        kind = "samples" if arguments.write_samples else "targets"
        spec = WriteSpec(
            kind=kind,
            out=arguments.write_samples or arguments.write_targets,
            count=arguments.count,
            per_folder=arguments.per_folder,
            batch_size=arguments.batch_size,
            shard=parse_shard(arguments.shard),
            steps=arguments.steps,
        )
        return write(config, spec)
    from distill.recipe import build_recipe
    from stages.engine.loop import train

    return train(build_recipe(config), config, arguments.resume)


def _few_steps(arguments: argparse.Namespace) -> int:
    from distill.few_steps_config import DistillClassConfig, load_config
    from stages.engine.loop import train

    config = load_config(arguments.config, arguments.set)
    if arguments.write_samples or arguments.write_targets:
        raise ValueError("--write-samples and --write-targets are for recipe 'distill'; few evaluations need neither")
    if arguments.dry_run:
        from distill.few_steps_plan import show

        return show(config, arguments)
    if isinstance(config, DistillClassConfig):
        from distill.few_steps_class import FewStepsRecipe

        return train(FewStepsRecipe(config), config, arguments.resume)
    from distill.few_steps_text import build_recipe

    return train(build_recipe(config), config, arguments.resume)


def _parser() -> argparse.ArgumentParser:
    parser = training_parser("bitdance distill", "Teach a model of larger patches what a model of smaller ones can do.")
    writing = parser.add_argument_group("instead of training")
    one = writing.add_mutually_exclusive_group()
    one.add_argument("--write-samples", type=Path, metavar="FOLDER", help="the teacher's pictures of the captions")
    one.add_argument("--write-targets", type=Path, metavar="FOLDER", help="the data with what the teacher predicts of it")
    writing.add_argument("--count", type=int, help="samples to write (default: as many as the data has)")
    writing.add_argument("--per-folder", type=int, default=5000, help="samples of a folder, the unit that is whole or absent")
    writing.add_argument("--batch-size", type=int, default=16, help="samples made at once (default: 16)")
    writing.add_argument("--shard", default="0/1", metavar="I/N", help="only folders I, I+N, … (one command per machine)")
    writing.add_argument("--steps", type=int, help="sampler steps per block (default: the teacher's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
