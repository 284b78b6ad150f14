"""`bitdance verify MODEL [--against OTHER]`: is a model folder sound, does it equal another, do two renditions agree.

    bitdance verify DIR                                          files, shapes, parameter counts, finite values, SHA-256
    bitdance verify DIR --against OTHER                          … and the difference of every tensor
    bitdance verify DIR --dtype bfloat16 --pictures 4            … and how many bits bfloat16 predicts as float32 does
    bitdance verify DIR --quantize int8 --at-least 0.99          … how many int8 does; exit code 1 below 99 %

Exit codes: 0 nothing is wrong, 1 something is, 2 bad usage.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdance.cli import Parser, UsageError, number, print_json, print_page
from bitdance.cli.options import DTYPE_HELP, DTYPE_NAMES, QUANTIZE, QUANTIZE_HEAD
from lfq_tokenizer.text import SHOWN, listed

PICTURES = 2  # that two renditions are compared on, unless --pictures says otherwise
PROMPTS = ("a red fox in the snow", "a bowl of fruit on a wooden table", "a lighthouse at night", "an old map of an island")


def run(argv: Sequence[str]) -> int:
    """Examine, compare, print."""
    options = _options(argv)

    from bitdance.folder.config import check_folder, resolve
    from bitdance.generator import kind_of, module_of

    folder = resolve(options.model)
    kind = module_of(folder)
    if _wants_agreement(options):
        check_folder(folder)  # which refuses other kinds than text models
    other = resolve(options.against) if options.against else None
    if other is not None:
        if kind_of(folder) != kind_of(other):
            raise UsageError(f"{options.model} is of kind {kind_of(folder)}, {options.against} of kind {kind_of(other)}")
        kind.rules(other)  # which checks it
    plan = _plan(options) if _wants_agreement(options) else None
    facts = kind.examine(folder, folder if options.model == "demo" else Path(options.model))
    sound = not facts["problems"]
    if sound and other is not None:
        facts["difference"] = kind.compare(folder, other)
        facts["problems"] += facts["difference"].pop("problems")
        _judge_difference(facts, options.tolerance)
    if sound and plan is not None:
        facts["agreement"] = _agreement(folder, other or folder, options, plan)
        if options.at_least is not None and facts["agreement"]["agree"] < options.at_least:
            share, asked = _percent(facts["agreement"]["agree"]), _percent(options.at_least)
            facts["problems"].append(f"{share} of bits agree, at least {asked} were asked for")
    print_json(facts) if options.json else print_page(_lines(facts, options.verbose))
    return 1 if facts["problems"] else 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bitdance verify",
        description="Is a model folder whole and sound; does it equal another; do two versions of it predict the same bits.",
        epilog="exit codes: 0 nothing is wrong, 1 something is, 2 bad usage",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, or demo")
    parser.add_argument("--against", metavar="OTHER", help="model folder to compare with, tensor by tensor; values may differ")
    apart = "… by no more than X; 0 asks for equal bits"
    parser.add_argument("--tolerance", type=number("tolerance"), metavar="X", help=apart)
    parser.add_argument("--json", action="store_true", help="one JSON object with every tensor and every file")
    parser.add_argument("-v", "--verbose", action="store_true", help="also the SHA-256 of every file")
    group = parser.add_argument_group(
        "how many bits two versions predict alike",
        "The reference is OTHER or, without --against, MODEL itself. It makes pictures, and both predict every block given the "
        "reference's earlier bits and the same random draws.",
    )
    group.add_argument("--dtype", choices=DTYPE_NAMES, help=f"of MODEL; {DTYPE_HELP}")
    group.add_argument("--quantize", choices=QUANTIZE, help="MODEL's LLM in 8 or 4 bits")
    group.add_argument("--quantize-head", choices=QUANTIZE_HEAD, help="MODEL's head in 8 bits")
    group.add_argument("--against-dtype", choices=DTYPE_NAMES, help="of the reference; default: bfloat16 on cuda, else float32")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt of the pictures; may be repeated")
    prompts.add_argument("--prompts", metavar="FILE", help="one prompt per line; default: what the model knows, or four of ours")
    group.add_argument("--pictures", type=number("pictures"), metavar="N", help=f"default: one per prompt given, else {PICTURES}")
    group.add_argument("--seed", type=number("seed"), default=0, help="of the first picture (default: 0), counting up")
    group.add_argument("--height", type=number("height"), metavar="H", help="pixels; default: the model's")
    group.add_argument("--width", type=number("width"), metavar="W", help="pixels; default: the model's")
    group.add_argument("--steps", type=number("steps"), help="sampler steps per block; default: the model's")
    group.add_argument("--device", help="default: cuda where there is one, else cpu")
    fewer = "exit code 1 when a smaller share of bits agrees"
    group.add_argument("--at-least", type=number("at_least"), metavar="SHARE", help=fewer)
    options = parser.parse_args(argv)
    if options.tolerance is not None and options.against is None:
        raise UsageError("--tolerance is a number from 0 on, and needs --against OTHER")
    return options


def _wants_agreement(options: argparse.Namespace) -> bool:
    """Any option of that group asks for it."""
    names = ("dtype", "quantize", "quantize_head", "against_dtype", "prompt", "prompts", "pictures", "at_least")
    return any(getattr(options, name) is not None for name in names)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """Device and dtypes. UsageError, before anything is read, when nothing differs between the two."""
    from bitdance.networks.precision import resolve_dtype, usable_device

    device = usable_device(options.device)
    dtype, other = resolve_dtype(options.dtype, device), resolve_dtype(options.against_dtype, device)
    if options.against is None and dtype == other and not (options.quantize or options.quantize_head):
        raise UsageError(
            f"both sides would be the same model in {dtype}; add --against OTHER, --dtype, --quantize or --quantize-head"
        )
    from bitdance.networks.quantize import check_quantization

    check_quantization(options.quantize, options.quantize_head, device)
    given = _prompts(options)
    return {"device": device, "dtype": dtype, "against_dtype": other, "prompts": given}


def _prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, [] where there are none."""
    from bitdance.jobs.prompt_file import PromptFile
    from bitdance.sequence.prompt import check_prompt

    if options.prompts:
        return [request.prompt for request in PromptFile.open(options.prompts, None)]
    for text in options.prompt or []:
        check_prompt(text)
    return options.prompt or []


def _agreement(folder: Path, reference: Path, options: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any]:
    """One model in memory at a time."""
    import torch

    from bitdance.folder.checkpoint import load_model
    from bitdance.folder.parts import read_extras
    from bitdance.folder.sizes import check_size, default_size
    from bitdance.heads.diffusion.settings import choose
    from bitdance.verify.agree import agreement, forced_predictions, reference_bits

    extras, wished = read_extras(reference), default_size(reference)
    height, width = options.height or wished[0], options.width or wished[1]
    check_size(reference, height, width)
    sampling = choose(extras.get("defaults", {}), steps=options.steps)
    known = extras.get("prompts")
    prompts = plan["prompts"] or (known if isinstance(known, list) and known else list(PROMPTS))
    count = options.pictures or (len(prompts) if plan["prompts"] else PICTURES)
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    seeds = [options.seed + i for i in range(count)]

    model = load_model(reference, plan["device"], getattr(torch, plan["against_dtype"]), generation_only=True)
    assert model.tokenizer is not None
    s = model.tokenizer.downsampling
    bits_BChw = reference_bits(model, prompts, height // s, width // s, sampling, seeds)
    expected_BMPC = forced_predictions(model, prompts, bits_BChw, sampling, seeds)
    del model
    model = load_model(folder, plan["device"], getattr(torch, plan["dtype"]), True, options.quantize, options.quantize_head)
    found = agreement(expected_BMPC, forced_predictions(model, prompts, bits_BChw, sampling, seeds))
    return {
        "reference": {"model": options.against or options.model, "dtype": plan["against_dtype"]},
        "compared": {
            "model": options.model,
            "dtype": plan["dtype"],
            "quantize": options.quantize,
            "quantize_head": options.quantize_head,
        },
        "device": plan["device"],
        "height": height,
        "width": width,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "prompts": prompts,
        "seeds": seeds,
        **found,
    }


def _judge_difference(facts: dict[str, Any], tolerance: float | None) -> None:
    if tolerance is None:
        return
    rows = facts["difference"]["tensors"]
    bad = [row for row in rows if not row["equal"] and (tolerance == 0 or row["max"] is None or row["max"] > tolerance)]
    if bad:
        names = listed([f"{row['part']} {row['name']}" for row in bad], ", ")
        facts["problems"].append(f"{len(bad)} tensors are more than {tolerance:g} apart: {names}")


def _lines(facts: dict[str, Any], verbose: bool) -> list[str]:
    counts = f"{facts['parameters']:,} parameters in {facts['tensors']} tensors"
    lines = [f"{facts['model']}: {counts}, fingerprint {facts['fingerprint']}"]
    for name, part in facts["parts"].items():
        dtypes = ", ".join(part["dtypes"])
        line = f"  {name:<10} {part['parameters']:>14,}  {dtypes}"
        if known := part["published"]:
            line += f"   {'as' if known['equal'] else 'NOT as'} published: {known['name']}, {known['parameters']:,}"
        lines.append(line)
    if verbose:
        lines += [f"  {file['sha256']}  {name}" for name, file in facts["files"].items()]
    else:
        lines.append(f"  {len(facts['files'])} files, whose SHA-256 -v and --json show")
    if "difference" in facts:
        lines += _difference_lines(facts["difference"])
    if "agreement" in facts:
        lines += _agreement_lines(facts["agreement"])
    lines += [f"warning: {text}" for text in facts["warnings"]]
    lines += [f"wrong: {text}" for text in facts["problems"]] or ["nothing wrong"]
    return lines


def _difference_lines(found: dict[str, Any]) -> list[str]:
    rows = found["tensors"]
    lines = [f"against {found['against']}: {found['equal']} of {len(rows)} tensors are equal bit for bit"]
    apart = [row for row in rows if not row["equal"]]
    apart.sort(key=lambda row: float("-inf") if row["max"] is None else -row["max"])
    for row in apart[:SHOWN]:
        size = "not comparable" if row["max"] is None else f"max {row['max']:.3g}, mean {row['mean']:.3g}"
        dtypes = row["dtype"] if row["dtype"] == row["other_dtype"] else f"{row['dtype']}, {row['other_dtype']}"
        lines.append(f"  {row['part']} {row['name']}: {size} ({dtypes})")
    if len(apart) > SHOWN:
        lines.append(f"  and {len(apart) - SHOWN} more, all of them with --json")
    for i, (key, (own, other)) in enumerate(found["configs"].items()):
        if i == SHOWN:
            lines.append(f"  and {len(found['configs']) - SHOWN} more config values")
            break
        lines.append(f"  {key}: {json.dumps(own, ensure_ascii=False)}, {json.dumps(other, ensure_ascii=False)}")
    return lines


def _agreement_lines(found: dict[str, Any]) -> list[str]:
    compared, reference = found["compared"], found["reference"]
    how = [compared["dtype"]]
    how += [f"{part} {compared[key]}" for part, key in (("LLM", "quantize"), ("head", "quantize_head")) if compared[key]]
    return [
        f"{compared['model']} ({', '.join(how)}) against {reference['model']} ({reference['dtype']}), teacher-forced: "
        f"{_percent(found['agree'])} of {found['bits']:,} bits agree, "
        f"predictions differ by {found['mean_difference']:.3g} on average",
        f"  {len(found['seeds'])} pictures of {found['height']}×{found['width']}, {found['steps']} steps, guidance "
        f"{found['guidance']:g}, on {found['device']}; the least agreeing one: {_percent(min(found['agree_by_picture']))}",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"
