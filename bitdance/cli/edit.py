"""`bitdance edit`: change a picture, with a kind of model that can.

    bitdance edit fox.png "a fox, 3D style, on a red background" --model models/refine -o red.png
    bitdance edit fox.png "a fox on a red background" --mask sky.png --model models/refine --seed 1 2 3 -o variants
    bitdance edit fox.png "a fox on a meadow" --extend 0 32 0 32 --model models/refine -o wide.png

With a mask its white part is drawn anew. Without one, a picture that says its own prompt (or --source-prompt) is changed where
the two prompts differ; otherwise all of it may change, and --strength says how far. --extend adds new ground at the top, the
right, the bottom and the left, in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdance.cli import Parser, UsageError, print_page
from bitdance.cli.options import DTYPE_HELP, DTYPE_NAMES
from bitdance.jobs.job import checked_prompt
from bitdance.values import check_number, from_text

SAID = ("steps", "guidance", "tau")


def parser() -> Parser:
    """The options."""
    parser = Parser(prog="bitdance edit", description="Change a picture: where a mask is white, or where two prompts differ.")
    parser.add_argument("picture", metavar="PICTURE", help="a picture, best one that this program made")
    parser.add_argument("prompt", nargs="?", help="what the picture shall show")
    parser.add_argument("--class", dest="label", metavar="N|NAME", help="of a class model, instead of a prompt")
    parser.add_argument("--model", metavar="DIR", required=True, help="model folder of a kind that can edit")
    parser.add_argument("-o", "--output", metavar="OUT.png|DIR", required=True, help="a file, or a folder for several seeds")
    parser.add_argument("--mask", metavar="MASK.png", help="a picture of the same size: white is drawn anew")
    parser.add_argument("--extend", nargs=4, metavar=("TOP", "RIGHT", "BOTTOM", "LEFT"), help="pixels of new ground on each side")
    parser.add_argument("--source-prompt", metavar="TEXT", help="what the picture shows now (default: what it says itself)")
    parser.add_argument("--source-class", metavar="N|NAME", help="the same of a class model")
    parser.add_argument("--whole", action="store_true", help="let all of the picture change, whatever it shows now")
    parser.add_argument("--strength", help="share of the steps that are taken, above 0 to 1; more changes more")
    parser.add_argument("--steps", help="steps of a whole picture")
    parser.add_argument("--guidance", help="strength of the prompt; 1 switches guidance off")
    parser.add_argument("--tau", help="temperature of the labels")
    parser.add_argument("--preset", help="settings at once; flags beside it win")
    parser.add_argument("--seed", nargs="+", metavar="S", default=["0"], help="one picture for each (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help=DTYPE_HELP)
    return parser


def run(argv: Sequence[str]) -> int:
    """Check, load, change, write. UsageError before a weight is read, as far as that can be told."""
    options = parser().parse_args(argv)
    seeds = [from_text("seed", seed, "--seed") for seed in options.seed]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seed {' '.join(options.seed)} names a seed twice; give each once")
    numbers = {name: from_text(name, getattr(options, name), f"--{name}") for name in SAID if getattr(options, name) is not None}
    strength = None if options.strength is None else from_text("strength", options.strength, "--strength")
    if (options.prompt is None) == (options.label is None):
        raise UsageError("say what the picture shall show: a prompt in quotes or --class N|NAME")
    if options.mask and options.extend:
        raise UsageError("--mask and --extend together; make the picture larger first, then change it")
    prompt = None if options.prompt is None else checked_prompt(options.prompt, "prompt")
    output = Path(options.output)
    if len(seeds) > 1 and output.suffix.lower() == ".png":
        raise UsageError(f"--seed names {len(seeds)} pictures and -o {output} one file; give a folder")

    from bitdance.folder.config import resolve  # torch only now
    from bitdance.generator import module_of
    from bitdance.networks.precision import usable_device
    from bitdance.picture import read_picture, write_png

    picture, found = read_picture(options.picture)
    mask = read_picture(options.mask)[0] if options.mask else None
    folder = resolve(options.model)
    kind = module_of(folder)
    takes = getattr(kind, "EDITS", ())
    if not takes:
        raise UsageError(f"the kind of model in {options.model} cannot edit; refinement and next-scale models can")
    for name in ("strength", "extend", "source_prompt", "source_class", "whole", "tau"):
        if getattr(options, name) not in (None, False) and name not in takes:
            raise UsageError(f"--{name.replace('_', '-')} is not for the kind of model in {options.model}; leave it out")
    how = {"mask": mask, "strength": strength, **(_source(options, found) if "source_prompt" in takes else {})}
    pipe = kind.load_pipeline(folder, usable_device(options.device), options.dtype)
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "tau": "tau"}
    said = {names[name]: value for name, value in numbers.items()}
    if options.extend:
        how["extend"] = tuple(from_text("extend", text, "--extend") for text in options.extend)
    how = {name: value for name, value in how.items() if value is not None}
    what = {"prompt": prompt, "class_label": options.label}
    out = pipe.edit(picture, **what, **how, num_images=len(seeds), seed=seeds, preset=options.preset, **said)
    settings = kind.edit_settings(pipe, options.preset, said)
    places = (
        [output] if output.suffix.lower() == ".png" else [output / f"{Path(options.picture).stem}-{seed}.png" for seed in seeds]
    )
    label = None if prompt is not None else pipe.names.number(options.label)
    words = {"prompt": prompt} if label is None else {"class": label, "class_name": pipe.names.name(label)}
    for place, image, seed in zip(places, out.images, seeds, strict=True):
        place.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_png(
            image, place, {**words, "seed": seed, **settings, "model": folder.resolve().name, "edit": Path(options.picture).name}
        )
    print_page([str(place) for place in places])
    return 0


def _source(options: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What the picture shows now: as said, else as it says itself, unless a mask or --whole decides what changes."""
    if options.source_prompt is not None:
        return {"source_prompt": checked_prompt(options.source_prompt, "--source-prompt")}
    if options.source_class is not None:
        return {"source_class": options.source_class}
    if options.mask or options.extend or options.whole:
        return {}
    if options.prompt is not None and isinstance(found.get("prompt"), str):
        return {"source_prompt": checked_prompt(found["prompt"], options.picture)}
    if options.label is not None and "class" in found:
        return {"source_class": check_number("class", found["class"], options.picture)}
    return {}
