"""How well a model changes what it is asked to change, and leaves the rest: another background behind pictures it was taught.

    bitdance measure edits --model MODEL --train TAUGHT_SHARDS --heldout HELDOUT_SHARDS [--count 100] [--grid OUT.png] [--json]

Each of `--count` taught renderings (picture × background) gets another background, in the canonical wording of its caption. The
model is told both captions and no mask: it finds itself what must change. *Background right* and *picture right* are those of
`measure prompts`, of the changed picture; *both* are right together. *Bits kept* is the share of the picture's bits that are as
before, *tokens free* the share of tokens that the model was free to change.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bitdance.cli import Parser, count
from bitdance.generator import load_pipeline
from bitdance.picture import grid, write_png
from stages.data.captions import PALETTE
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.measure.prompts import background_of, open_gallery
from stages.recipes.tokenizer.feed import picture_of

SHOWN = 32  # pairs of a grid


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Image.Image]]:
    """All figures as JSON values, and pictures before and after. ValueError for a model that cannot edit."""
    pipe = load_pipeline(model_folder(arguments.model))
    if not hasattr(pipe, "edit"):
        raise ValueError(f"--model {arguments.model}: a {pipe.kind} model, which cannot edit")
    pipe.set_progress_bar_config(disable=True)
    data = ShardDataset(ShardIndex.open(list(arguments.train)))
    gallery = open_gallery(pipe, arguments.train, arguments.heldout)
    chosen = torch.randperm(gallery.taught, generator=torch.Generator().manual_seed(arguments.seed))[: arguments.count].tolist()
    wordings = {(rendering.picture, rendering.background): rendering.captions[0] for rendering in gallery.renderings}
    sums = dict.fromkeys(("background", "picture", "both", "bits_kept", "tokens_free"), 0.0)
    shown: list[Image.Image] = []
    settings = {name: value for name, value in vars(arguments).items() if name in ("strength", "guidance_scale") and value}
    for place, index in enumerate(chosen):
        before, rendering = picture_of(data[index]), gallery.renderings[index]
        others = sorted(name for name in PALETTE if name != rendering.background and (rendering.picture, name) in wordings)
        wanted = others[(place + arguments.seed) % len(others)]
        source, target = rendering.captions[0], wordings[rendering.picture, wanted]
        out = pipe.edit(before, target, source_prompt=source, seed=arguments.seed + place, **settings)
        bits = pipe.encode(before)
        after = out.images[0]
        background = background_of(after) == wanted
        picture = gallery.renderings[gallery.nearest([after])[0][0]].picture == rendering.picture
        kept = out.tokens == bits
        values = (background, picture, background and picture, kept.float().mean(), 1 - kept.all(dim=1).float().mean())
        for name, value in zip(sums, values, strict=True):
            sums[name] += float(value)
        if len(shown) < 2 * SHOWN:
            shown += [before, after]
    found = {"pictures": len(chosen), **{name: value / len(chosen) for name, value in sums.items()}}
    return {"model": str(arguments.model), "seed": arguments.seed, **settings, **found}, shown


def main(argv: list[str]) -> int:
    """`bitdance measure edits …`."""
    parser = Parser(prog="bitdance measure edits", description="Another background behind taught pictures; does the object stay?")
    parser.add_argument("--model", required=True, help="a model folder, a run or a checkpoint that can edit")
    parser.add_argument("--train", nargs="+", required=True, help="shards of pictures the model was taught")
    parser.add_argument("--heldout", nargs="+", required=True, help="shards of picture × background pairs it never saw")
    parser.add_argument("--count", type=count, default=100, help="pictures that are changed (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures, and of the changes (default: 0)")
    parser.add_argument("--strength", type=float, help="as of `bitdance edit`")
    parser.add_argument("--guidance", dest="guidance_scale", type=float, help="default: the model's own")
    parser.add_argument("--grid", type=Path, help="write pictures before and after")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args(argv)
    figures, pictures = measure(arguments)
    if arguments.json:
        print(json.dumps(figures))
    else:
        shares = "  ".join(f"{name.replace('_', ' ')} {100 * figures[name]:.1f} %" for name in list(figures)[-5:])
        print(f"{figures['pictures']} taught pictures on another background: {shares}")
    if arguments.grid:  # last: what was found is shown, also where the grid cannot be written
        write_png(grid(pictures, columns=8), arguments.grid)
    return 0
