"""`bitdance sizes MODEL [--json]`: which pictures a model makes. Reads configs, no weights."""

import json
from collections.abc import Sequence

from bitdance.cli import Parser


def run(argv: Sequence[str]) -> int:
    """Print the supported sizes of a model folder (or "demo")."""
    parser = Parser(prog="bitdance sizes", description="Picture sizes of a model, height × width in pixels.")
    parser.add_argument("model", metavar="MODEL", nargs="?", default="demo", help="model folder or demo (default)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(argv)

    from bitdance.checkpoint import resolve
    from bitdance.generator import module_of

    folder = resolve(options.model)
    found = module_of(folder).sizes(folder)
    if options.json:
        print(json.dumps(found))
        return 0
    for height, width in found["sizes"]:
        print(f"{height}×{width}" + (" (default)" if (height, width) == tuple(found["default"]) else ""))
    if not found["only_these"]:
        sides = f"from {found['smallest_side']} to {found['largest_side']} pixels"
        print(f"and every other size whose sides are multiples of {found['multiple_of']} {sides}")
    return 0
