"""`bitdance bench`: seconds, operations and bytes by phase, against this machine's own peak; images per second by batch size."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitdance.bench import OWN
from bitdance.cli import Parser, count, number, print_json, print_page
from bitdance.cli.options import DTYPE_HELP, DTYPE_NAMES, QUANTIZE, QUANTIZE_HEAD
from bitdance.generator import module_of

EPILOG = """\
--shape needs no weights: random ones of that shape take the same time. --floor needs no machine either:
  bitdance bench --shape 14b-64x --floor h200 --preset own quick --batch 1 16         8xh200: eight, a batch on each
  bitdance bench --shape 14b-64x --floor 790e12,4.3e12 --batch 1 16                  FLOP/s and bytes/s of any machine

With one thread on a CPU seconds are CPU time, which a busy neighbour hardly disturbs; else they are the clock's on the wall.
The floor of a phase is its operations at the peak of a large matrix product, or its bytes at that of a large copy."""


def run(argv: Sequence[str]) -> int:
    """Measure, or with --floor compute, and print."""
    parser = Parser(
        prog="bitdance bench",
        description="How fast pictures are made, and how fast this machine could make them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR", help='a model folder; default "demo", the bundled model')
    source.add_argument("--shape", metavar="NAME", help="random weights of a shape: 14b-64x, 14b-16x, mid")
    parser.add_argument("--height", type=number("height"), metavar="N", help="pixels; default: the model's own")
    parser.add_argument("--width", type=number("width"), metavar="N", help="pixels; default: the model's own")
    parser.add_argument("--steps", type=number("steps"), help="sampler steps per block; default: the model's own")
    parser.add_argument("--guidance", type=number("guidance"), help="default: the model's own; <= 1 leaves guidance out")
    parser.add_argument("--sampler", help="default euler_maruyama")
    parser.add_argument("--preset", nargs="+", default=[OWN], help="one or more; own (the default): the model's settings")
    parser.add_argument(
        "--batch", type=number("batch_size"), nargs="+", default=[1], metavar="N", help="pictures at once, one or more numbers"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPE_NAMES, help=f"one or more; {DTYPE_HELP}")
    parser.add_argument("--quantize", choices=QUANTIZE, help="the LLM's matrices in 8 or 4 bits")
    parser.add_argument("--quantize-head", choices=QUANTIZE_HEAD, help="the head's matrices in 8 bits")
    parser.add_argument("--no-compile", action="store_true", help="on CUDA: no torch.compile, no CUDA graphs")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--threads", type=count, metavar="N", help="of a CPU; default: torch's own choice")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="runs of which the median counts, default 3")
    parser.add_argument("--yardstick", action="store_true", help="also time the published procedure, written plainly")
    parser.add_argument("--floor", metavar="GPU|F,B", help="run nothing: the floor of h200, 8xh200, …, or F FLOP/s and B bytes/s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the JSON object to a file, too")
    options = parser.parse_args(argv)
    if options.output and not options.output.absolute().parent.is_dir():
        raise ValueError(f"output = {str(options.output)!r}: there is no folder {str(options.output.parent)!r}; make it first")

    from lfq_tokenizer.files import write_text
    from lfq_tokenizer.json_file import json_text

    found, text = module_of(options.model or "demo").bench(options)
    if options.output:
        write_text(json_text(found) + "\n", options.output)
    print_json(found) if options.json else print_page(text.split("\n"))
    return 0
