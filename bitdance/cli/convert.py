"""`bitdance convert FOREIGN OUT --family FAMILY [--part NAME=FILE …]`: published files of other systems → a model folder of ours.

bitdance convert BitDance_B_1x.pt models/B-1x --family imagenet --part tokenizer=ae_d16c32.pt
"""

from collections.abc import Sequence
from pathlib import Path

from bitdance.cli import Parser, UsageError, print_json, print_page
from bitdance.generator import FAMILIES
from lfq_tokenizer.text import listed


def run(argv: Sequence[str]) -> int:
    """Read, check, write; print what was found."""
    parser = Parser(
        prog="bitdance convert",
        description="Make a model folder of what other systems published. Nothing in the files is run.",
        epilog="parts: tokenizer (its own .pt, or a folder), classes (a classes.json), config (fields that the "
        "weights do not show)",
    )
    parser.add_argument("foreign", metavar="FOREIGN", help="the published file (.pt or .safetensors)")
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--family", required=True, choices=FAMILIES, help="where the file comes from")
    parser.add_argument(
        "--part", action="append", default=[], metavar="NAME=FILE", help="a part that lies in a file of its own; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(argv)

    from importlib import import_module

    family = import_module(FAMILIES[options.family])
    facts = family.convert(Path(options.foreign), Path(options.out), _parts(options.part, family.PARTS))
    if options.json:
        print_json(facts)
    else:
        print_page(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}" for name, value in facts.items())
    return 0


def _parts(said: Sequence[str], allowed: Sequence[str]) -> dict[str, Path]:
    parts: dict[str, Path] = {}
    for text in said:
        name, equals, file = text.partition("=")
        if not equals or not file or name not in allowed:
            raise UsageError(f"--part {text!r}; NAME=FILE is allowed, with NAME one of {listed(allowed, ', ')}")
        if name in parts:
            raise UsageError(f"--part {name} is given twice; keep one")
        if not Path(file).exists():
            raise FileNotFoundError(f"--part {name}: {file} does not exist; give a file")
        parts[name] = Path(file)
    return parts
