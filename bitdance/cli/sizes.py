"""`bitdance sizes MODEL [--json]`: which pictures a model makes. Reads configs, no weights."""

from collections.abc import Sequence

from bitdance.cli import Parser, print_json, print_page


def run(argv: Sequence[str]) -> int:
    """Print the supported sizes of a model folder (or "demo")."""
    parser = Parser(prog="bitdance sizes", description="Picture sizes of a model, height × width in pixels.")
    parser.add_argument("model", metavar="MODEL", nargs="?", default="demo", help="model folder or demo (default)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(argv)

    from bitdance.folder.config import resolve
    from bitdance.generator import module_of

    folder = resolve(options.model)
    found = module_of(folder).sizes(folder)
    if options.json:
        print_json(found)
        return 0
    lines = [f"{h}×{w}" + (" (default)" if (h, w) == tuple(found["default"]) else "") for h, w in found["sizes"]]
    if not found["only_these"]:
        sides = f"from {found['smallest_side']} to {found['largest_side']} pixels"
        lines.append(f"and every other size whose sides are multiples of {found['multiple_of']} {sides}")
    print_page(lines)
    return 0
