"""`bitdance info MODEL | PICTURE.png [--json] [--prompts]`: what a folder of a model or a tokenizer holds, or how a picture was
made."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitdance.cli import Parser, UsageError, print_json, print_page

LINE = 200  # letters of a fact that is shown without -v


def run(argv: Sequence[str]) -> int:
    """Print the facts about a model folder (or "demo"), or the settings inside a PNG. No weights are loaded."""
    parser = Parser(prog="bitdance info", description="What a model folder holds, or how a picture was made.")
    parser.add_argument("what", metavar="MODEL|PICTURE.png", nargs="?", default="demo", help="model folder, demo or a PNG")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--prompts", action="store_true", help="list the prompts that the model knows, and nothing else")
    parser.add_argument("-v", "--verbose", action="store_true", help="every fact, also those that fill a page")
    options = parser.parse_args(argv)
    path = Path(options.what)
    if path.suffix.lower() == ".png" or path.is_file():
        if options.prompts:
            raise UsageError(f"--prompts lists what a model knows; {options.what} is a picture")
        from bitdance.picture import read_metadata

        return _show(read_metadata(path), options)

    from bitdance.folder.config import resolve
    from bitdance.folder.parts import is_tokenizer_alone, read_extras
    from bitdance.generator import module_of

    folder = resolve(options.what)
    if options.prompts:
        return _show_prompts(options.what, read_extras(folder).get("prompts"), options.json)
    return _show(_tokenizer(folder) if is_tokenizer_alone(folder) else module_of(folder).info(folder), options)


def _tokenizer(folder: Path) -> dict[str, Any]:
    """The facts about a folder that holds a tokenizer and nothing else, as training and converting one leave it."""
    from bitdance.folder.fingerprint import fingerprint
    from bitdance.folder.parts import TOKENIZER_CONFIG, TOKENIZER_WEIGHTS, count_parameters, file_sizes
    from lfq_tokenizer import TokenizerConfig
    from lfq_tokenizer.json_file import read_json

    config, files = TokenizerConfig.from_published(read_json(folder / TOKENIZER_CONFIG)), file_sizes(folder)
    return {
        "tokenizer": "generative decoder" if config.gan_decoder else "plain decoder",
        "parameters": count_parameters(folder / TOKENIZER_WEIGHTS),
        "bits_per_token": config.bits,
        "downsampling": config.downsampling,
        "bits_per_pixel": config.bits / config.downsampling**2,
        "widths": [config.ch * factor for factor in config.ch_mult],
        "fingerprint": fingerprint(folder),
        "bytes": sum(files.values()),
        "files": files,
    }


def _show(facts: dict[str, Any], options: argparse.Namespace) -> int:
    if options.json:
        print_json(facts)
    else:
        print_page(_page(facts, options.verbose))
    return 0


def _page(facts: dict[str, Any], verbose: bool) -> Iterator[str]:
    """A line for each fact that fits on one, but for -v; the last line names what was left out."""
    left_out = []
    for key, value in facts.items():
        if key in ("sizes", "default_size"):
            sizes = [value] if key == "default_size" else value
            yield f"{key}: " + ", ".join(f"{height}×{width}" for height, width in sizes)
        elif isinstance(value, dict):
            rows = {name: _text(content) for name, content in value.items()}
            short = {name: text for name, text in rows.items() if verbose or (len(text) <= LINE and key != "files")}
            left_out += [key] if len(short) < len(rows) and not short else [name for name in rows if name not in short]
            if short or not rows:
                yield f"{key}:" + ("" if rows else " none")
            yield from (f"  {name}: {text}" for name, text in short.items())
        else:
            yield f"{key}: {_text(value)}"
    if left_out:
        yield f"more with -v or --json: {', '.join(left_out)}"


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{value:,}" if value >= 100_000 else str(value)


def _show_prompts(name: str, prompts: Any, as_json: bool) -> int:
    if not prompts:
        raise UsageError(f"model {name!r} names no prompts (bitdance.json has no 'prompts'); any text may be tried")
    if as_json:
        print_json(prompts)
        return 0
    for group, words in prompts.items() if isinstance(prompts, dict) else (("", prompts),):
        lines = [("  " if group else "") + _text(word) for word in (words if isinstance(words, list) else [words])]
        print_page([*([f"{group}:"] if group else []), *lines])
    return 0
