"""`bitdance sizes MODEL [--json]`: which pictures a model makes. Reads configs, no weights."""

from collections.abc import Sequence

from bitdance.cli import Parser, print_json, print_page


def run(argv: Sequence[str]) -> int:
    """Print the supported sizes of a model folder (or "demo")."""
    parser = Parser(prog="bitdance sizes", description="Picture sizes of a model, height × width in pixels.")
    parser.add_argument("model", metavar="MODEL", nargs="?", default="demo", help="model folder or demo (default)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(argv)

    from bitdance.checkpoint import resolve
    from bitdance.sizes import default_size, rule_of_folder, supported_sizes

    rule = rule_of_folder(resolve(options.model))
    default, sizes = default_size(rule), supported_sizes(rule)
    usable = [side * rule.downsampling for side in rule.sides if side % rule.patch_side == 0]
    if options.json:
        print_json({
            "default": default,
            "sizes": sizes,
            "only_these": bool(rule.trained),
            "multiple_of": rule.unit,
            "smallest_side": min(usable),
            "largest_side": max(usable),
        })
        return 0
    lines = [f"{height}×{width}" + (" (default)" if (height, width) == default else "") for height, width in sizes]
    if not rule.trained:
        lines.append(
            f"and every other size whose sides are multiples of {rule.unit} from {min(usable)} to {max(usable)} pixels"
        )
    print_page(lines)
    return 0
