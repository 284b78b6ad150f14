"""`bitdance generate`: prompts or classes → one PNG each. Everything is checked before a weight is loaded or a file written.

    bitdance generate "a red apple, 3D style" --seed 1 2 3 -o out
    bitdance generate --class 207 "golden retriever" --model models/B-16x -o out
    bitdance generate --prompts jobs.jsonl -o out --shard 0/8
    bitdance generate --from out/0000-a-red-apple-1.png --steps 100 -o again

Which value holds: a key of a JSONL line, else the flag, else (with --from) the picture's own value, else the model's
default. Every prompt starts at seed 0 unless --seed says otherwise, so that its picture does not depend on its place in
a file; picture k of a prompt (--images-per-prompt, or "n") has seed + k, as in `BitDancePipeline`.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance.cli import Parser, UsageError, print_page, report
from bitdance.cli.options import DTYPE_HELP, DTYPE_NAMES, PRESETS, QUANTIZE, QUANTIZE_HEAD, SAMPLERS
from bitdance.cli.progress import Progress
from bitdance.cli.stop import Stopped, StopSignals
from bitdance.jobs.job import Job, JobDefaults, Jobs, Request, checked_prompt, parse_shard, requests_from_arguments
from bitdance.jobs.prompt_file import KEYS, PromptFile
from bitdance.values import check_interval, check_number, from_text, shown
from lfq_tokenizer.files import DiskFull

if TYPE_CHECKING:
    from bitdance.folder.adapters import Adapter
    from bitdance.jobs.outputs import Failures, OutputFolder
    from bitdance.jobs.runner import RunSpec

BATCH_SIZE = 8
WINDOW = 4096  # jobs that are sorted into batches together


def run(argv: Sequence[str]) -> int:
    """Make the pictures; the exit code is that of the command."""
    options = parser().parse_intermixed_args(argv)
    return make(read_spec(options))


def make(spec: "RunSpec") -> int:
    """Make what is missing. 0 all done, 1 some failed (failures.jsonl), 128 + signal when stopped."""
    from bitdance.jobs.npz import check_npz, write_npz
    from bitdance.jobs.outputs import OutputFolder
    from bitdance.jobs.runner import BatchRunner

    output = OutputFolder(spec.output, spec.model, spec.shard)
    output.check_writable()
    if spec.npz:
        check_npz(spec.jobs, spec.sizes, spec.shard, spec.output)
    runner = BatchRunner(spec, output, lambda path, seconds: print_page([f"{path}: {seconds:.2f} s"] if spec.verbose else []))
    with StopSignals() as stop:
        try:
            with output.held(), Progress(len(spec.jobs), spec.quiet) as progress:
                pipe = None
                for jobs in _windows(spec.jobs):
                    todo = output.missing(jobs, spec.hash)
                    progress.skip(len(jobs) - len(todo))
                    if todo:
                        pipe = pipe or spec.rules.load(spec)
                        runner.make(pipe, todo, stop.held, progress.show)
                output.write_failures(runner.failures)
                if spec.npz and not runner.failures:
                    write_npz(spec.jobs, spec.output)
                shown_on_grid = spec.grid and output.write_grid(spec.jobs, [job for job, _ in runner.failures])
        except Stopped as stopped:
            if runner.failures:
                output.write_failures(runner.failures)
            report(f"{stopped} after {runner.made} of {len(spec.jobs)} pictures; the same command goes on from there", "stopped")
            return stopped.code
        except DiskFull as error:
            report(f"{error}; {runner.made} pictures are kept, the same command goes on from there")
            return 1
        except OSError as error:
            report(
                f"{error.strerror or error} ({error.filename or spec.output}); {runner.made} pictures are kept, "
                "the same command goes on from there"
            )
            return 1
    return conclude(spec, output, runner.made, runner.failures, progress.before, shown_on_grid)


def _windows(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs by the thousand: inside a window they are sorted into batches, and no more than one of them is held."""
    iterator = iter(jobs)
    while window := list(islice(iterator, WINDOW)):
        yield window


def conclude(spec: "RunSpec", output: "OutputFolder", made: int, failures: "Failures", before: int, grid: bool) -> int:
    """Say what is there now; the exit code. `before`: pictures that were there already."""
    count = len(spec.jobs) - len(failures)
    if not spec.quiet:
        lines = [f"{count} picture{'' if count == 1 else 's'} in {spec.output} ({made} made, {before} there before)"]
        print_page([*lines, *([f"grid: {output.grid}"] if grid else [])])
    if failures:
        report(f"{len(failures)} of {len(spec.jobs)} pictures failed: {failures[0][1]}; all are listed in {output.failures}")
        return 1
    return 0


def parser(prog: str = "bitdance generate") -> Parser:
    """The options that `read_spec` reads; `examples/ray_generate.py` adds its own."""
    parser = Parser(
        prog=prog,
        description="Draw pictures from prompts: one PNG each, and a line in manifest.jsonl. Finished pictures are skipped.",
        epilog=f"JSONL keys: {', '.join(KEYS)}; only prompt, or class, is required. A key wins over its flag.",
    )
    parser.add_argument("prompt", nargs="*", help='one or more prompts; "" is a picture without a prompt')
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts from a file: .txt (one per line), .jsonl (one object per line), or - for standard input",
    )
    parser.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        metavar="N|NAME|all|random:COUNT",
        help="classes instead of prompts, for a class model: numbers, names, all, or COUNT at random",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PICTURE.png",
        help="make a finished picture again, from the prompt and settings that it carries; flags win",
    )
    parser.add_argument("-o", "--output", metavar="DIR", default="out", help="folder for the pictures (default: out)")
    parser.add_argument("--model", metavar="DIR|demo", help="model folder; demo (default) is the bundled model")
    parser.add_argument("--height", help="pixels; default: the model's")
    parser.add_argument("--width", help="pixels; default: the model's")
    parser.add_argument("--steps", help="solver steps per block; fewer are quicker and coarser")
    parser.add_argument("--guidance", help="how strongly the prompt counts; 1 switches guidance off, which halves the work")
    parser.add_argument("--preset", help=f"solver and steps at once: {', '.join(PRESETS)}; flags beside it win")
    parser.add_argument("--sampler", help=f"solver: {', '.join(SAMPLERS)} (published: the first)")
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only between these times of the solver, which go from 0 (noise) to 1 (bits)",
    )
    parser.add_argument("--last-steps", help="solver steps of the last block; from --steps in the first one they change evenly")
    parser.add_argument("--cfg-schedule", help="for a class model: linear (guidance rises from block to block) or constant")
    parser.add_argument("--tau", help="of a refinement model: temperature of the labels")
    parser.add_argument("--schedule", help="of a refinement model: linear, cosine or ramp, how fast labels settle")
    parser.add_argument("--seed", nargs="+", metavar="S", help="one picture of each prompt for each seed (default: 0)")
    parser.add_argument("--images-per-prompt", metavar="K", help="pictures per prompt and seed, with seeds counting up")
    parser.add_argument("--batch-size", metavar="B", help=f"pictures made at once (default: {BATCH_SIZE})")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument(
        "--no-compile", action="store_true", help="on cuda: leave out torch.compile and CUDA graphs, for a quicker start"
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help=DTYPE_HELP)
    parser.add_argument("--quantize", choices=QUANTIZE, help="LLM in 8 or 4 bits: half or a quarter of bfloat16's memory")
    parser.add_argument("--quantize-head", choices=QUANTIZE_HEAD, help="diffusion head in 8 bits")
    parser.add_argument("--lora", metavar="DIR", help="folder of a LoRA adapter, which bitdance export RUN DIR --adapter writes")
    parser.add_argument("--lora-scale", metavar="S", help="strength of the adapter; 1 (default) is as trained")
    parser.add_argument(
        "--offload", action="store_true", help="keep the model in main memory, and on the device only what a phase needs"
    )
    parser.add_argument("--shard", metavar="I/N", default="0/1", help="only pictures I, I+N, I+2N, … of the whole list")
    parser.add_argument("--grid", action="store_true", help="also write grid.png, all pictures on one sheet")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz, all pictures shuffled, for ADM's evaluator")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors and warnings")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each picture")
    return parser


def read_spec(options: argparse.Namespace) -> "RunSpec":
    """Check all that can be checked without loading weights; ValueError or FileNotFoundError name what is wrong."""
    shard = parse_shard(options.shard)
    batch_size = BATCH_SIZE if options.batch_size is None else from_text("batch_size", options.batch_size, "--batch-size")
    flags = _flags(options)
    picture = _picture(options)
    requests = _requests(options, picture)
    model = options.model or _model_of(picture, options.source)

    from bitdance.folder.config import resolve  # torch only now
    from bitdance.generator import module_of
    from bitdance.jobs.runner import RunSpec
    from bitdance.networks.precision import resolve_dtype, usable_device
    from bitdance.networks.quantize import check_quantization, speed_of

    folder = resolve(model)
    rules = module_of(folder).rules(folder)
    for name in rules.unknown:
        if getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} is not for the kind of model in {model}; leave it out")
    height, width = rules.default_size
    if adapter := _adapter(options, picture, folder):
        rules.adapt(adapter)
    settings = rules.sampling(_overrides(options, picture, getattr(rules, "words", ())), options.preset, bool(picture))
    values: dict[str, Any] = {
        "height": height,
        "width": width,
        "steps": settings.steps,
        "guidance": float(settings.guidance),
        **{key: picture[key] for key in ("height", "width", "steps", "guidance") if key in picture},
        **flags,
    }
    values.setdefault("seeds", (picture["seed"],) if "seed" in picture else (0,))
    jobs = Jobs(requests, JobDefaults(**values), partial(rules.check_size, settings=settings), shard, rules.requests)

    for guidance in jobs.guidances:
        settings.changed(guidance=guidance)  # which the model may not take

    device = usable_device(options.device)
    dtype = resolve_dtype(options.dtype or picture.get("dtype"), device)
    quantized = {name: getattr(options, name) or picture.get(name) for name in ("quantize", "quantize_head")}
    check_quantization(**quantized, device=device)
    if device == "cpu" and not options.quiet:
        for kind in dict.fromkeys(filter(None, quantized.values())):
            report(speed_of(kind, dtype), "warning")
    if options.offload and device == "cpu":
        raise UsageError("--offload needs a device beside main memory; leave it out on cpu")
    mark = rules.fingerprint()
    if picture.get("model_fingerprint", mark) != mark:
        report(f"{options.source} was made with other weights ({picture['model_fingerprint']}, not {mark})", "warning")
    return RunSpec(
        jobs=jobs,
        rules=rules,
        settings=settings,
        model=model,
        folder=folder,
        fingerprint=mark,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        shard=shard,
        output=Path(options.output),
        grid=options.grid,
        npz=options.npz,
        compile=False if options.no_compile else None,
        sizes=frozenset(jobs.sizes),
        offload=options.offload,
        quiet=options.quiet,
        verbose=options.verbose,
        adapter=adapter,
        **quantized,
    )


def _adapter(options: argparse.Namespace, picture: dict[str, Any], model: Path) -> "Adapter | None":
    """The adapter of --lora. A picture of --from that was made with one is not made again without."""
    if options.lora is None:
        if options.lora_scale is not None:
            raise UsageError("--lora-scale is the strength of an adapter; name that with --lora DIR")
        if "lora_fingerprint" in picture:
            name = picture.get("lora", "")
            raise UsageError(f"{options.source} was made with the adapter {name!r}; say where that is with --lora DIR")
        return None
    from bitdance.folder.adapters import Adapter

    said = options.lora_scale
    scale = picture.get("lora_scale", 1.0) if said is None else from_text("lora_scale", said, "--lora-scale")
    adapter = Adapter.read(options.lora, scale)
    adapter.check_base(model)
    if (mark := picture.get("lora_fingerprint", adapter.fingerprint)) != adapter.fingerprint:
        report(f"{options.source} was made with another adapter ({mark}, not {adapter.fingerprint})", "warning")
    return adapter


def _overrides(options: argparse.Namespace, picture: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The settings beside steps and guidance that override the model's: flags, else the picture of --from (unless a preset is
    named). `words`: those that the kind has of its own, and checks."""
    overrides: dict[str, Any] = {}
    if picture and options.preset is None:
        overrides = {
            name: picture[name] for name in ("sampler", "guidance_interval", "last_steps", "cfg_schedule") if name in picture
        }
        overrides |= {name: picture["said"][name] for name in words if name in picture["said"] and name not in overrides}
    if options.tau is not None:
        overrides["tau"] = from_text("tau", options.tau, "--tau")
    for name in ("sampler", "cfg_schedule", "schedule"):
        if getattr(options, name) is not None:
            overrides[name] = getattr(options, name)
    if options.guidance_interval is not None:
        pair = [from_text("guidance_interval", text, "--guidance-interval") for text in options.guidance_interval]
        overrides["guidance_interval"] = check_interval(pair, "--guidance-interval")
    if options.last_steps is not None:
        overrides["last_steps"] = from_text("last_steps", options.last_steps, "--last-steps")
    return overrides


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    """Values of the flags that were given, under the names of `JobDefaults`."""
    flags = {
        name: from_text(name, getattr(options, name), f"--{name}")
        for name in ("height", "width", "steps", "guidance")
        if getattr(options, name) is not None
    }
    if options.images_per_prompt is not None:
        flags["n"] = from_text("n", options.images_per_prompt, "--images-per-prompt")
    if options.seed is not None:
        flags["seeds"] = tuple(from_text("seed", seed, "--seed (prompts go before it)") for seed in options.seed)
    return flags


def _requests(options: argparse.Namespace, picture: dict[str, Any]) -> Iterable[Request]:
    places = (("--prompts", options.prompts), ("--from", options.source), ("--class", options.classes))
    given = [name for name, value in places if value is not None]
    if len(given) > 1 or (given and given != ["--from"] and options.prompt):
        raise UsageError("prompts come from one place: as arguments, or --prompts FILE, or --from PICTURE.png, or --class N|NAME")
    if options.prompts is not None:
        return PromptFile.open(options.prompts, getattr(sys.stdin, "buffer", None))
    if options.classes is not None:
        return [Request("", f"--class {shown(label)}", label=label) for label in options.classes]
    if options.prompt:
        return requests_from_arguments(options.prompt)
    if "class" in picture:
        return [Request("", options.source, label=picture["class"])]
    if picture:
        return [Request(picture["prompt"], options.source)]
    raise UsageError('no prompt; write one in quotes, or --prompts FILE. Example: bitdance generate "a red apple"')


def _picture(options: argparse.Namespace) -> dict[str, Any]:
    """The checked settings inside the PNG of --from; {} without --from. Anyone may have written them."""
    if options.source is None:
        return {}
    from bitdance.picture import read_metadata

    found, source = read_metadata(options.source), options.source
    if "edit" in found:
        raise UsageError(f"{source} is a changed picture ({shown(found['edit'])}); `bitdance edit` makes it again from that one")
    if "negative_prompt" in found:
        against = shown(found["negative_prompt"])
        raise UsageError(f"{source} was made with the negative prompt {against}, which `bitdance serve` and Python take")
    settings: dict[str, Any] = {"said": found}
    if "class" in found:
        settings["class"] = check_number("class", found["class"], source)
    elif "prompt" in found:
        settings["prompt"] = checked_prompt(found["prompt"], source)
    else:
        raise UsageError(f"{source} does not say its prompt; it was not made by `bitdance generate`")
    for name in ("seed", "height", "width", "steps", "guidance", "last_steps", "lora_scale"):
        if name in found:
            settings[name] = check_number(name, found[name], source)
    if "guidance_interval" in found:
        settings["guidance_interval"] = check_interval(found["guidance_interval"], source)
    texts = ("model", "model_fingerprint", "lora", "lora_fingerprint", "cfg_schedule")
    for name in texts:
        if not isinstance(found.get(name, ""), str):
            raise UsageError(f"{source}: {name} = {shown(found[name])}; a text is allowed")
    choices = {"sampler": SAMPLERS, "dtype": DTYPE_NAMES[:3], "quantize": QUANTIZE, "quantize_head": QUANTIZE_HEAD}
    for name, allowed in choices.items():
        if name in found and found[name] not in allowed:
            raise UsageError(f"{source} was made with {name} {shown(found[name])}; there are {', '.join(allowed)}")
    return settings | {name: found[name] for name in (*choices, *texts) if name in found}


def _model_of(picture: dict[str, Any], source: str) -> str:
    if picture.get("model", "demo") != "demo":
        raise UsageError(f"{source} was made with the model {picture['model']!r}; say where that is with --model DIR")
    return "demo"
