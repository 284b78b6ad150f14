"""The pictures of a benchmark: made by `bitdance generate`, which goes on where it was stopped, then laid out for its scripts.

    bitdance evaluate run geneval evaluation_metadata.jsonl --model MODEL -o DIR [--shard I/N] [options of bitdance generate]

DIR/pictures is what was made; DIR/geneval (dpg, hps) the layout, DIR/pictures/samples.npz that of classes. DIR/evaluation.json is
written last, when nothing is missing: those scripts pass over missing files in silence, so a set with gaps is never called
complete. Shards make pictures; the same command without --shard lays them out.
"""

import argparse
import hashlib
import json
import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bitdance.cli import Parser, count, print_page, report
from bitdance.cli import generate as generating
from bitdance.folder.config import resolve
from bitdance.generator import module_of
from bitdance.jobs.job import Request, parse_shard
from bitdance.jobs.npz import NAME as NPZ
from bitdance.jobs.outputs import OutputFolder
from bitdance.values import check_number
from lfq_tokenizer.files import whole_folder, write_text
from lfq_tokenizer.json_file import write_json
from lfq_tokenizer.lock import FolderLock
from stages.evaluate.sets import BENCHMARKS, Item, request_lines

DONE, PROMPTS, PICTURES = "evaluation.json", "prompts.jsonl", "pictures"
PER_CLASS = 50
OURS = ("--prompts", "--class", "--from", "--npz", "--images-per-prompt", "--seed", "--output", "--grid")


def main(argv: Sequence[str]) -> int:
    """Make what is missing. 0: the set is complete, or this shard's share is there; else the code of `bitdance generate`."""
    arguments, rest = _parser().parse_known_args(list(argv))
    if wrong := [word for word in rest if len(word) > 2 and any(own.startswith(word.split("=")[0]) for own in OURS)]:
        raise ValueError(f"{wrong[0]} is what this command says itself; --pictures, --first-seed and -o are for it")
    shard, folder = parse_shard(arguments.shard), Path(arguments.output)
    check_number("seed", arguments.first_seed, "--first-seed")
    items = _items(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, shared=shard[1] > 1):  # before a file of another command's is touched
        return _make(arguments, items, rest, shard, "bitdance evaluate run " + shlex.join(argv))


def _make(arguments: argparse.Namespace, items: Sequence[Item], rest: list[str], shard: tuple[int, int], command: str) -> int:
    folder = Path(arguments.output)
    whole = [*_what(arguments, items, folder), "--model", arguments.model, "-o", str(folder / PICTURES), *rest]
    spec = generating.read_spec(generating.parser().parse_intermixed_args(whole))
    pictures = OutputFolder(folder / PICTURES, spec.model)
    if any(not pictures.is_done(job, spec.hash(job)) for job in spec.jobs):
        (folder / DONE).unlink(missing_ok=True)  # what it says is no longer so
    sharded = ["--shard", arguments.shard] if shard[1] > 1 else (["--npz"] if arguments.set == "classes" else [])
    if code := generating.run([*whole, *sharded]):
        return code
    gaps = [job.file for job in spec.jobs if not pictures.is_done(job, spec.hash(job))]
    if gaps and shard[1] > 1:
        print_page(
            [f"{len(gaps)} of {len(spec.jobs)} pictures are still missing; when all shards are done, the same without --shard"]
        )
        return 0
    if gaps:
        report(f"{len(gaps)} of {len(spec.jobs)} pictures are missing, {gaps[0]} first; the set is not complete")
        return 1
    if shard[1] > 1:
        print_page(["all pictures are there; the same command without --shard lays them out"])
        return 0
    place = _lay_out(arguments, items, folder)
    said = {
        "set": arguments.set,
        "source": None if arguments.source is None else str(arguments.source),
        "prompts_sha256": hashlib.sha256((folder / PROMPTS).read_bytes()).hexdigest() if items else None,
        "prompts": len(items) or None,
        "pictures": len(spec.jobs),
        "first_seed": arguments.first_seed,
        "model": spec.model,
        "fingerprint": spec.fingerprint,
        "settings": {**_settings(spec), "dtype": spec.dtype},
        "command": command,
        "date": date.today().isoformat(),
    }
    write_json(said, folder / DONE)
    print_page([f"{len(spec.jobs)} pictures, none missing, in {place}"])
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="bitdance evaluate run",
        description="The pictures of a benchmark, in the layout that its scripts read. Finished pictures are skipped.",
        epilog="All further options are those of bitdance generate, for example --steps, --guidance, --batch-size, --dtype.",
    )
    parser.add_argument("set", choices=[*BENCHMARKS, "classes"], help="the benchmark")
    parser.add_argument(
        "source", nargs="?", type=Path, help="your copy: evaluation_metadata.jsonl; a folder of .txt (dpg) or of .json (hps)"
    )
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--pictures", type=count, help="per prompt (4; hps: 1) or class (50)")
    parser.add_argument("--random", type=count, metavar="COUNT", help="of classes: COUNT pictures of classes at random instead")
    parser.add_argument("--first-seed", type=int, default=0, help="every picture has its own seed, from this one on (default: 0)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only pictures I, I+N, I+2N, … of the whole list")
    return parser


def _items(arguments: argparse.Namespace) -> list[Item]:
    if arguments.set == "classes":
        if arguments.source is not None:
            raise ValueError(f"{arguments.source}: classes are those of the model; leave it out")
        if arguments.random and arguments.pictures:
            raise ValueError("--random says how many pictures in all, --pictures how many of each class; give one of them")
        return []
    if arguments.random:
        raise ValueError("--random is for classes; leave it out")
    if arguments.source is None:
        raise ValueError(f"{arguments.set} has prompts, which are not part of this package; give your copy of the benchmark")
    return BENCHMARKS[arguments.set].items(arguments.source)


def _what(arguments: argparse.Namespace, items: Sequence[Item], folder: Path) -> list[str]:
    """What `bitdance generate` is told to make."""
    if not items and arguments.random:
        return ["--class", f"random:{arguments.random}", "--seed", str(arguments.first_seed)]
    if not items:
        n, model = arguments.pictures or PER_CLASS, resolve(arguments.model)
        classes = [one.label for one in module_of(model).rules(model).requests(Request("", "evaluate run classes", label="all"))]
        rows = ({"id": f"class-{c}", "class": c, "seed": arguments.first_seed + k * n, "n": n} for k, c in enumerate(classes))
        write_text("".join(json.dumps(row) + "\n" for row in rows), folder / PROMPTS)
        return ["--prompts", str(folder / PROMPTS)]
    write_text(request_lines(items, _pictures(arguments), arguments.first_seed), folder / PROMPTS)
    return ["--prompts", str(folder / PROMPTS)]


def _pictures(arguments: argparse.Namespace) -> int:
    return int(arguments.pictures or BENCHMARKS[arguments.set].pictures)


def _lay_out(arguments: argparse.Namespace, items: Sequence[Item], folder: Path) -> Path:
    """The benchmark's own folder, whole or not at all."""
    if not items:
        return folder / PICTURES / NPZ
    target, n = folder / arguments.set, _pictures(arguments)
    with whole_folder(target) as working:
        for k, item in enumerate(items):
            seeds = range(arguments.first_seed + k * n, arguments.first_seed + (k + 1) * n)
            files = [folder / PICTURES / f"{item.id}-{seed}.png" for seed in seeds]
            BENCHMARKS[arguments.set].lay_out(item, files, working)
    return target


def _settings(spec: Any) -> dict[str, Any]:
    first = next(iter(spec.jobs))
    numbers = {name: getattr(first, name) for name in ("height", "width", "steps", "guidance")}
    return numbers | dict(getattr(spec.settings, "words", {}))
