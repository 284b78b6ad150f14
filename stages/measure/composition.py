"""Whether a model composes: GenEval's six tasks on scenes of icons, judged by what a detector finds in the pictures.

    bitdance data pack scenes shards/scenes-heldout --size 128 --concepts 1000 --count 600 --split heldout
    bitdance measure composition --model MODEL --scenes shards/scenes-heldout [--grid OUT.png] [--prompts OUT.jsonl] [--json]

Single object, two objects, counting, colours, position, colour attribution: `--count` held-out prompts each, in the wording that
names everything or, with `--wording order` or `name`, in one that no caption has. A picture is right where the detector finds
what GenEval's line asks for; *overall* is their mean. The rows above the model's are its bounds: the scenes themselves, which say
how far the detector is to be trusted, and the scenes as the model's tokenizer gives them back.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from bitdance.cli import Parser, count
from bitdance.generator import load_pipeline
from bitdance.picture import grid, write_png
from lfq_tokenizer.files import write_text
from stages.data.archives import DEFAULT_CACHE
from stages.data.scenes import TASKS, Shelf
from stages.data.shards import Sample, ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.measure.detector import Detector, right
from stages.recipes.tokenizer.feed import picture_of

BATCH = 20
PLAIN = "plain"
WORDINGS = (PLAIN, "order", "name")


def chosen(data: ShardDataset, count: int, wording: str = PLAIN) -> list[Sample]:
    """The first `count` scenes of every task that can be worded so, with that prompt as their caption. ValueError for shards that
    hold fewer, or no scenes."""
    found: dict[str, list[Sample]] = {task: [] for task in TASKS}
    for i in range(len(data)):
        sample = data.readable(data.__getitem__, i)
        same = None if sample is None else found.get(str(sample.attributes.get("task")))
        if sample is not None and same is not None and len(same) < count and (prompt := prompt_of(sample, wording)):
            same.append(replace(sample, captions=[prompt]))
        if all(len(scenes) == count for scenes in found.values()):
            return [sample for scenes in found.values() for sample in scenes]
    least = min(found, key=lambda task: len(found[task]))
    raise ValueError(
        f"--scenes holds {len(found[least])} scenes of the task {least} in --wording {wording}, --count wants {count} of each; "
        "make more with `bitdance data pack scenes`"
    )


def prompt_of(sample: Sample, wording: str) -> str | None:
    """The prompt of a scene; None where it cannot be worded so."""
    if wording == PLAIN:
        return sample.captions[0]
    found = sample.attributes.get("untaught")
    return found.get(wording) if isinstance(found, dict) else None


def score(pictures: Sequence[Image.Image], scenes: Sequence[Sample], detector: Callable[[Image.Image], Any]) -> dict[str, float]:
    """The share of right pictures by task, and their mean."""
    counts = dict.fromkeys(TASKS, 0)
    for picture, scene in zip(pictures, scenes, strict=True):
        counts[scene.attributes["task"]] += right(detector(picture), scene.attributes["geneval"])
    shares = {task: counts[task] * len(TASKS) / len(scenes) for task in TASKS}
    return {**shares, "overall": sum(shares.values()) / len(TASKS)}


def generated(pipe: Any, scenes: Sequence[Sample], seed: int, size: int | None, **settings: Any) -> list[Image.Image]:
    """A picture for the first caption of every scene, seeds from `seed` on."""
    found: list[Image.Image] = []
    shape = {} if size is None else {"height": size, "width": size}
    for start in range(0, len(scenes), BATCH):
        prompts = [scene.captions[0] for scene in scenes[start : start + BATCH]]
        found += pipe(prompts, seed=[seed + start + i for i in range(len(prompts))], **shape, **settings).images
    return found


def main(argv: list[str]) -> int:
    """`bitdance measure composition …`."""
    parser = Parser(prog="bitdance measure composition", description="GenEval's six tasks on scenes of icons.")
    parser.add_argument("--model", help="a model of prompts; without one the detector alone is judged")
    parser.add_argument("--scenes", nargs="+", required=True, help="shards of `bitdance data pack scenes`, best a held-out split")
    parser.add_argument("--count", type=count, default=100, help="prompts of each task (default: 100)")
    parser.add_argument(
        "--wording",
        choices=WORDINGS,
        default=PLAIN,
        help="order: an order of the words that no caption has; name: another name of a thing, held out as well (default: plain)",
    )
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--steps", type=int, help="solver steps per block; default: the model's own")
    parser.add_argument("--guidance", type=float, help="strength of the prompt; default: the model's own")
    parser.add_argument("--preset", help="default: the model's own")
    parser.add_argument("--grid", type=Path, help="write the first eight pictures of every task")
    parser.add_argument("--prompts", type=Path, help="write the prompts as GenEval's JSONL")
    parser.add_argument("--cache", default=DEFAULT_CACHE, help="where the icon archives lie or are fetched to")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    a = parser.parse_args(argv)
    scenes = chosen(ShardDataset(ShardIndex.open(list(a.scenes))), a.count, a.wording)
    if a.prompts:
        write_text(
            "".join(json.dumps({**scene.attributes["geneval"], "prompt": scene.captions[0]}) + "\n" for scene in scenes),
            a.prompts,
        )
    real = [picture_of(scene) for scene in scenes]
    styles = dict.fromkeys(str(scene.attributes["style"]) for scene in scenes)
    detector = Detector(Shelf(tuple(styles), "all", a.cache))
    rows = {"scenes": score(real, scenes, detector)}
    pictures = real
    if a.model is not None:
        pipe = load_pipeline(model_folder(a.model))
        pipe.set_progress_bar_config(disable=True)
        if pipe.names is not None:
            raise ValueError(f"--model {a.model}: a model of classes; composition is asked for in prompts")
        rows["through the tokenizer"] = score([pipe.decode(pipe.encode(picture))[0] for picture in real], scenes, detector)
        settings = {"num_inference_steps": a.steps, "guidance_scale": a.guidance, "preset": a.preset}
        pictures = generated(pipe, scenes, a.seed, a.size, **settings)
        rows["generated"] = score(pictures, scenes, detector)
    text = json.dumps({"count": a.count, "wording": a.wording, "seed": a.seed, **rows}) if a.json else "\n".join(table(rows))
    print(text, flush=True)  # first: shown, also where the grid cannot be written
    if a.grid:
        shown = min(8, a.count)
        write_png(grid([pictures[k * a.count + i] for k in range(len(TASKS)) for i in range(shown)], shown), a.grid)
    return 0


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """The rows as lines of Markdown."""
    names = [*TASKS, "overall"]
    lines = ["| pictures | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---|" + "---:|" * len(names)]
    return lines + [f"| {name} | " + " | ".join(f"{row[task]:.1%}" for task in names) + " |" for name, row in rows.items()]
