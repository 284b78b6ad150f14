"""The training sub-commands of `bitdance`; each takes its arguments and returns an exit code.

bitdance data pack|inspect …      bitdance train CONFIG          bitdance tokenizer encode|decode|eval|convert|lpips …
bitdance export CHECKPOINT OUT    bitdance measure prompts …
bitdance evaluate run|score|compare …                          bitdance card MODEL FIGURES.json
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from bitdance.cli import Parser, print_page
from stages.command import guarded

MEASURES = {
    "prompts": "how well a text model follows its prompts",
    "composition": "does it compose: GenEval's six tasks on scenes of icons",
    "solvers": "what fewer sampler steps cost",
    "edits": "does a changed picture show what was asked, and keep the rest",
    "classes": "how well a class-conditional model makes its classes, beside real pictures",
    "few_steps": "a student of few evaluations beside its teacher",
}

EVALUATIONS = {
    "run": "the pictures of a benchmark, in the layout that its scripts read",
    "score": "Fréchet distances, inception score, precision, recall, CLIP score, PSNR, SSIM, LPIPS",
    "compare": "figures of several files side by side",
}


def data(argv: Sequence[str] | None = None) -> int:
    """`bitdance data …`: captioned pictures → shards."""
    from stages.data.cli import main

    return guarded("bitdance data", main, argv)


def train(argv: Sequence[str] | None = None) -> int:
    """`bitdance train CONFIG`: one process; `torchrun -m stages CONFIG` runs several."""
    return guarded("bitdance train", _train, argv)


def _train(argv: list[str]) -> int:
    arguments = training_parser("bitdance train", "Train the model that a config describes.").parse_args(argv)

    from stages.config import load_config
    from stages.recipe import build_recipe, package_of

    config = load_config(arguments.config, arguments.set)
    if arguments.dry_run:
        from stages.plan.command import show

        plan, text = package_of(config).plan_run(config, arguments)
        return show(plan, text, config, arguments.json)
    from stages.engine.loop import train as run

    recipe = build_recipe(config)
    return run(recipe, config, arguments.resume)


def training_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options that every command of training has."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("config", help="a TOML file; see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value of the config")
    parser.add_argument("--resume", default="auto", help="auto (newest checkpoint of the run), no, or a checkpoint folder")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing; needs no weights and no GPU")
    plan = parser.add_argument_group("with --dry-run")
    # where none of these is given and there is no GPU, the plan is for this machine's processor, if the run fits its memory
    plan.add_argument("--processes", help="numbers of GPUs: 64,8,512; the config's batch is meant for the first (default: 1)")
    plan.add_argument("--gpu-memory", type=float, metavar="GIB", help="of a GPU (default: 80)")
    plan.add_argument("--peak-tflops", type=float, help="of a GPU, dense bfloat16 (default: 989, an H100; A100: 312)")
    plan.add_argument("--mfu", type=float, help="share of the peak that training reaches (default: 0.4)")
    plan.add_argument("--caption-tokens", type=int, default=128, help="of an average caption (default: 128)")
    plan.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # some launchers add it
    return parser


def tokenizer(argv: Sequence[str] | None = None) -> int:
    """`bitdance tokenizer encode|decode|eval|convert|lpips`."""
    from stages.recipes.tokenizer.cli import main

    return guarded("bitdance tokenizer", main, argv)


def export(argv: Sequence[str] | None = None) -> int:
    """`bitdance export CHECKPOINT OUT --format official|diffusers`."""
    return guarded("bitdance export", _export, argv)


def _export(argv: list[str]) -> int:
    parser = Parser(
        prog="bitdance export",
        description="Make a model folder of a training checkpoint, or of a model folder in another layout.",
    )
    parser.add_argument("checkpoint", type=Path, help="a folder step_NNNNNNNN of a run, the run (its newest), or a model folder")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--format", choices=["official", "diffusers"], default="official", help="layout (default: official)")
    dtypes = ["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
    parser.add_argument("--dtype", choices=dtypes, help="default: that of every tensor (checkpoints: float32)")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged (default), or as trained last")
    parser.add_argument("--extras", type=Path, help="JSON file merged into bitdance.json: defaults, sizes, prompts, card")
    parser.add_argument("--decoder", type=Path, help="tokenizer whose decoder replaces the model's own (same encoder)")
    parser.add_argument("--adapter", action="store_true", help="of a run with [generator.lora]: its adapter alone, not merged")
    parser.add_argument("--base", help="model that an adapter is merged with (default: generator.init of its run)")
    arguments = parser.parse_args(argv)

    from stages.export import export_adapter, export_checkpoint

    rest = (arguments.dtype, arguments.extras, arguments.decoder, arguments.base)
    if arguments.adapter:
        if any(value is not None for value in rest):
            raise ValueError("--adapter writes the adapter as it is; --dtype, --extras, --decoder and --base are for merging")
        export_adapter(arguments.checkpoint, arguments.out)
    else:
        export_checkpoint(arguments.checkpoint, arguments.out, *rest, arguments.format, arguments.weights)
    print_page([str(arguments.out)])
    return 0


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`bitdance evaluate run|score|compare`: the field's benchmarks and scores."""
    return guarded("bitdance evaluate", _evaluate, argv)


def _evaluate(argv: list[str]) -> int:
    parser = Parser(prog="bitdance evaluate", description="Pictures of benchmarks, their scores, and scores side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in EVALUATIONS.items():
        commands.add_parser(name, help=what, add_help=False)
    command = parser.parse_known_args(argv[:1])[0].command
    return int(import_module(f"stages.evaluate.{command}").main(argv[1:]))


def card(argv: Sequence[str] | None = None) -> int:
    """`bitdance card MODEL FIGURES.json`: figures → the model card."""
    return guarded("bitdance card", lambda rest: int(import_module("stages.evaluate.card").main(rest)), argv)


def measure(argv: Sequence[str] | None = None) -> int:
    """`bitdance measure prompts|composition|solvers|edits|classes|few_steps`: how well a model does."""
    return guarded("bitdance measure", _measure, argv)


def _measure(argv: list[str]) -> int:
    parser = Parser(prog="bitdance measure", description="How well a trained model does, in figures.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in MEASURES.items():
        commands.add_parser(name, help=what, add_help=False)
    command = parser.parse_known_args(argv)[0].command
    return int(import_module(f"stages.measure.{command}").main(argv[argv.index(command) + 1 :]))
