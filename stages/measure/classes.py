"""How well a class-conditional model makes its classes, beside what real pictures and the tokenizer alone reach.

    bitdance measure classes --model MODEL --train SHARDS --test SHARDS --guidance 1 2 3 [--plot OUT.png] [--json]

All figures are told from 1280 features of EfficientNet-Lite0 (`stages/measure/frechet.py`):

- *distance*: the EfficientNet-Lite0 Fréchet distance to the test pictures. It is not FID. Beside that of the generated pictures
  stand the *floor*, that of as many training pictures, and that of the tokenizer's *reconstructions* of test pictures;
- *precision* and *recall* in the same space, k = 3: which share of generated pictures lies among the test pictures, and the
  reverse (`stages/evaluate/scores.py`);
- *variety*: the mean distance between two pictures of one class, beside that of test pictures;
- *class right*: the share of pictures that a linear probe assigns to the class asked for. The probe is a logistic regression,
  learned from features of training pictures; its accuracy on test pictures stands beside.

Pictures are generated in equal numbers per class, picture k of all with seed `--seed` + k, the same for every guidance. What
takes long (pictures, features) is kept in `--cache` and not made again.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from bitdance.cli import Parser
from bitdance.generator import load_pipeline, module_of, settings_beside
from bitdance.jobs.job import slug
from bitdance.networks.precision import quick_dtype
from bitdance.picture import grid, to_uint8, write_png
from lfq_tokenizer.files import whole_file
from lfq_tokenizer.json_file import parse_json, read_json, write_json
from lfq_tokenizer.text import printable
from stages.data.order import EpochOrder
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.checkpoint import model_folder
from stages.evaluate.scores import NEIGHBOUR, Gaussian, frechet, precision_recall
from stages.measure.frechet import FrechetFeatures, lite0_features
from stages.measure.reconstruction import round_trip
from stages.recipes.pictures.labels import label_of
from stages.schema import check_key

BATCH, GENERATED = 100, 250  # pictures that run through features and tokenizer, and through the model, at once
DECAY = 1e-3  # of the probe's weights, which look at standardised features
SHOWN = 4  # pictures of each class in a grid
ALIKE = 200  # pictures of a class whose distances to one another are taken


@dataclass(frozen=True)
class Pictures:
    """uint8 pictures (N,H,W,3) and the number of each one's class (N,)."""

    levels_NHW3: np.ndarray
    class_N: Tensor


def real_pictures(data: ShardDataset, numbers: Callable[[Any], int], count: int, seed: int) -> Pictures:
    """`count` samples of a data set in an order that the seed decides (0: all, as they come). ValueError for a sample without a
    picture or a class, and for more samples than there are."""
    if count > len(data):
        raise ValueError(f"{count} pictures are asked for, the shards hold {len(data)}; ask for fewer")
    order = EpochOrder(len(data), seed)
    samples = (data.take(order.at(place) if count else place) for place in range(count or len(data)))
    levels, classes = [], []
    for sample in samples:
        if sample.picture is None:
            raise ValueError(f"sample {sample.key} holds bits and no picture; give shards of pictures")
        levels.append(np.asarray(sample.picture.convert("RGB")))
        classes.append(numbers(label_of(sample.attributes)))
    return Pictures(np.stack(levels), torch.tensor(classes))


class Features:
    """Features of pictures, kept in a folder under the hash of the pixels."""

    def __init__(self, network: FrechetFeatures, cache: Path, dtype: str) -> None:
        self.network, self.cache, self.dtype = network, cache, dtype
        self._module = network.network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, levels_NHW3: np.ndarray) -> Tensor:
        """(N,H,W,3) → (N,F) float32."""
        digest = hashlib.sha256(np.ascontiguousarray(levels_NHW3).tobytes()).hexdigest()[:24]
        path = self.cache / f"{self.network.name}-{self.dtype}-{len(levels_NHW3)}-{digest}.npy"
        if path.is_file():
            return torch.from_numpy(np.load(path, allow_pickle=False))
        parts = []
        for part in torch.from_numpy(levels_NHW3).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
                parts.append(self._module(part.permute(0, 3, 1, 2)).float())
        found = torch.cat(parts)
        with whole_file(path) as working:
            np.save(working, found.numpy())
        return found


class Probe:
    """Logistic regression on standardised features (N,F), fitted by L-BFGS to its minimum: no random number is drawn."""

    def __init__(self, features_NF: Tensor, class_N: Tensor, classes: int) -> None:
        self.mean, self.deviation = features_NF.mean(0), features_NF.std(0).clamp(min=1e-6)
        x = self._standard(features_NF)
        self.weight, self.bias = torch.zeros(classes, x.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(x @ self.weight.T + self.bias, class_N) + DECAY / 2 * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def right(self, features_NF: Tensor, class_N: Tensor) -> Tensor:
        """Which pictures are assigned to their class, bool (N,)."""
        return (self._standard(features_NF) @ self.weight.T + self.bias).argmax(1) == class_N

    def _standard(self, features_NF: Tensor) -> Tensor:
        return (features_NF - self.mean) / self.deviation


def distance(one_NF: Tensor, other_MF: Tensor) -> float:
    """Fréchet distance of two sets of features."""
    return frechet(Gaussian.of(one_NF), Gaussian.of(other_MF))


def variety(features_NF: Tensor, class_N: Tensor) -> float | None:
    """Mean distance of two pictures of one class, of up to 200 a class; None where no class has two."""
    groups = [features_NF[class_N == c][:ALIKE] for c in class_N.unique()]
    apart = [torch.pdist(group.float()).mean() for group in groups if len(group) > 1]
    return float(torch.stack(apart).mean()) if apart else None


@dataclass(frozen=True)
class Row:
    """Figures of one set of pictures. `right`: share of the class asked for, by class and of all; `variety`: see there; `steps`:
    the mean of those that the pictures took."""

    name: str
    count: int
    distance: float | None
    right: float
    by_class: dict[str, float]
    variety: float | None
    guidance: float | None = None
    steps: float | None = None
    preset: str | None = None
    pictures_per_s: float | None = None
    precision: float | None = None
    recall: float | None = None


class Generated:
    """Balanced pictures of a class model, kept in a folder batch by batch under the model's fingerprint and the settings."""

    def __init__(self, pipe: Any, cache: Path, model: str, seed: int) -> None:
        self.pipe, self.seed = pipe, seed
        self.folder = cache / f"generated-{model}"
        pipe.set_progress_bar_config(disable=True)

    def make(self, count: int, settings: dict[str, Any]) -> tuple[Pictures, float | None, float | None]:
        """`count` pictures, how many were made in a second (None: they were there), and the mean of their steps, where the model
        says them."""
        class_N = torch.arange(count) % len(self.pipe.names)
        made_of = [settings, self.seed, *([] if self.pipe.dtype == torch.float32 else [str(self.pipe.dtype)])]
        said = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        (self.folder / said).mkdir(parents=True, exist_ok=True)
        levels, made, begun = [], 0, time.monotonic()
        steps: list[int] = []
        for start in range(0, count, GENERATED):
            numbers = class_N[start : start + GENERATED].tolist()
            path = self.folder / said / f"{start:06d}-{len(numbers)}.npy"
            if not path.is_file():
                seeds = [self.seed + start + i for i in range(len(numbers))]
                out = self.pipe(class_label=numbers, seed=seeds, output_type="pt", **settings)
                write_json(out.steps, path.with_suffix(".json"))
                with whole_file(path) as working:
                    np.save(working, to_uint8(2 * out.images - 1).cpu().numpy())
                made += len(numbers)
            levels.append(np.load(path, allow_pickle=False))
            steps += read_json(path.with_suffix(".json")) or []
        seconds = time.monotonic() - begun
        mean = sum(steps) / len(steps) if steps else None
        return Pictures(np.concatenate(levels), class_N), made / seconds if made == count else None, mean


def measure(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures as JSON values; see the module."""
    folder = model_folder(arguments.model)
    mark = module_of(folder).info(folder)["fingerprint"]
    pipe = load_pipeline(folder, "cpu", arguments.dtype)
    names, tokenizer = getattr(pipe, "names", None), pipe.model.tokenizer
    if names is None:
        raise ValueError(f"--model {arguments.model}: a {pipe.kind} model; measure classes looks at models of classes")
    sweep = list(_sweep(arguments))
    _check(module_of(folder).rules(folder), [settings for _, settings in sweep])
    cache = Path(arguments.cache)
    cache.mkdir(parents=True, exist_ok=True)
    dtype = quick_dtype("cpu")
    features = Features(lite0_features(), cache, dtype)
    train, test = (ShardDataset(ShardIndex.open(places)) for places in (arguments.train, arguments.test))
    say("real pictures")
    known = real_pictures(train, names.number, min(arguments.probe, len(train)), arguments.seed)
    judged = real_pictures(test, names.number, arguments.references, arguments.seed)
    known_NF, judged_NF = features(known.levels_NHW3), features(judged.levels_NHW3)
    probe = Probe(known_NF, known.class_N, len(names))

    def row(name: str, pictures: Pictures, found_NF: Tensor, far: bool = True, **more: Any) -> Row:
        right = probe.right(found_NF, pictures.class_N).float()
        by_class = {names.name(c): float(right[pictures.class_N == c].mean()) for c in range(len(names))}
        if far and min(len(found_NF), len(judged_NF)) > NEIGHBOUR:
            more["precision"], more["recall"] = precision_recall(judged_NF, found_NF)
        apart = distance(found_NF, judged_NF) if far else None
        return Row(name, len(right), apart, float(right.mean()), by_class, variety(found_NF, pictures.class_N), **more)

    count = min(arguments.pictures, len(known.class_N), len(judged.class_N))
    rows = [row("test pictures", judged, judged_NF, far=False)]
    rows.append(row("training pictures (floor)", Pictures(known.levels_NHW3[:count], known.class_N[:count]), known_NF[:count]))
    say("reconstructions")
    stride = len(judged.class_N) // count
    some = Pictures(judged.levels_NHW3[::stride][:count], judged.class_N[::stride][:count])
    back = Pictures(_reconstructed(tokenizer, some.levels_NHW3), some.class_N)
    rows.append(row("reconstructions of test pictures", back, features(back.levels_NHW3)))
    generated = Generated(pipe, cache, mark, arguments.seed)
    for name, settings in sweep:
        say(name)
        pictures, speed, mean = generated.make(arguments.pictures, settings)
        steps = settings.get("num_inference_steps") if mean is None else mean
        said = {"guidance": settings["guidance_scale"], "steps": steps, "preset": settings.get("preset")}
        rows.append(row(f"generated, {name}", pictures, features(pictures.levels_NHW3), **said, pictures_per_s=speed))
        if arguments.grid is not None:
            there = max(1, min(SHOWN, len(pictures.class_N) // len(names)))
            first = [c + len(names) * k for c in range(len(names)) for k in range(there)]
            path = Path(arguments.grid)
            path = path.with_name(f"{path.stem}-{slug(name)}{path.suffix}") if len(sweep) > 1 else path
            write_png(grid(list(map(Image.fromarray, pictures.levels_NHW3[first])), columns=max(1, there) * 5), path)
    return {
        "model": str(arguments.model),
        "fingerprint": mark,
        "features": f"EfficientNet-Lite0, 1280, {dtype}",
        "probe": {"pictures": len(known.class_N), "accuracy": rows[0].right},
        "seed": arguments.seed,
        "settings": _extra(arguments),
        "date": date.today().isoformat(),
        "rows": [asdict(found) for found in rows],
    }


def _sweep(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """A name, and the arguments of the pipeline, for every preset, number of steps and guidance that was asked for."""
    for preset, steps, guidance in product(arguments.preset, arguments.steps, arguments.guidance):
        settings = {**_extra(arguments), "guidance_scale": guidance}
        settings |= {} if steps is None else {"num_inference_steps": steps}
        settings |= {} if preset is None else {"preset": preset}
        words = [*([preset] if preset else []), *([f"{steps} steps"] if steps else []), f"guidance {guidance:g}"]
        yield ", ".join(words), settings


def _check(rules: Any, sweep: Sequence[dict[str, Any]]) -> None:
    """ValueError, before a picture is looked at, for a setting that the model does not have or take."""
    known = settings_beside(rules)
    for settings in sweep:
        said = dict(settings)
        preset, steps, guidance = said.pop("preset", None), said.pop("num_inference_steps", None), said.pop("guidance_scale")
        if steps is not None and "steps" in rules.unknown:
            raise ValueError("--steps is not for a model of this kind, whose scales follow from the size; leave it out")
        for name in said:
            check_key(name, known)
        rules.sampling(said, preset, False).changed(steps=steps, guidance=guidance)


def _extra(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of --cfg-schedule and --set. ValueError for what is no NAME=JSON."""
    found = {} if arguments.cfg_schedule is None else {"cfg_schedule": arguments.cfg_schedule}
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {text}: NAME=VALUE is allowed, with VALUE in JSON, for instance tau=1.2")
        found[name] = parse_json(value, "--set")
    return found


@torch.no_grad()
def _reconstructed(tokenizer: Any, levels_NHW3: np.ndarray) -> np.ndarray:
    parts = []
    for part in torch.from_numpy(levels_NHW3).split(BATCH):
        images_B3HW = part.permute(0, 3, 1, 2).to(next(tokenizer.parameters())) / 127.5 - 1
        out_B3HW, _ = round_trip(tokenizer, images_B3HW, torch.Generator().manual_seed(0))
        parts.append(to_uint8(out_B3HW.float()).cpu().numpy())
    return np.concatenate(parts)


def table(found: dict[str, Any]) -> str:
    """The rows for people, as Markdown."""
    lines = ["| pictures | count | distance | class right | variety | precision | recall | pictures/s |", "|---|" + "---:|" * 7]
    for row in found["rows"]:
        far = "–" if row["distance"] is None else f"{row['distance']:.2f}"
        speed = "–" if row["pictures_per_s"] is None else f"{row['pictures_per_s']:.1f}"
        near = " | ".join("–" if row[name] is None else f"{row[name]:.2f}" for name in ("variety", "precision", "recall"))
        lines.append(f"| {row['name']} | {row['count']:,} | {far} | {row['right']:.1%} | {near} | {speed} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Distance and class right against guidance, or against steps where those differ. ModuleNotFoundError where matplotlib is
    missing."""
    from matplotlib.figure import Figure

    generated = [row for row in found["rows"] if row["guidance"] is not None]
    axis = "steps" if len({row["steps"] for row in generated}) > 1 else "guidance"
    rows = sorted(generated, key=lambda row: row[axis])
    places = [row[axis] for row in rows]
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    left.plot(places, [row["distance"] for row in rows], "o-", color="tab:blue")
    left.set_xlabel(f"{axis} (mean)" if axis == "steps" else axis)
    for row, place in zip(rows, places, strict=True):
        if row["preset"] and len({other["preset"] for other in rows}) > 1:
            left.annotate(row["preset"], (place, row["distance"]), textcoords="offset points", xytext=(4, 4), fontsize=7)
    left.set_ylabel("EfficientNet-Lite0 Fréchet distance (not FID)", color="tab:blue")
    right = left.twinx()
    right.plot(places, [row["right"] for row in rows], "s--", color="tab:orange")
    right.set_ylabel("share of the class asked for (linear probe)", color="tab:orange")
    right.set_ylim(0, 1)
    left.set_title(f"{rows[0]['count']:,} pictures for each setting, seed {found['seed']}", fontsize=9)
    with whole_file(path) as working:
        figure.savefig(working, dpi=120, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """`bitdance measure classes`; 0. ValueError and FileNotFoundError are the user's to mend."""
    parser = Parser(prog="bitdance measure classes", description="Class-conditional models beside real pictures.")
    parser.add_argument("--model", required=True, help="a model folder, a run or a checkpoint of a class model")
    parser.add_argument(
        "--train", nargs="+", required=True, metavar="SHARDS", help="real pictures with classes, for the probe and the floor"
    )
    parser.add_argument("--test", nargs="+", required=True, metavar="SHARDS", help="real pictures with classes, to compare with")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="one or several: a sweep (default: 1)")
    parser.add_argument("--cfg-schedule", choices=["linear", "constant"], help="default: the model's")
    parser.add_argument("--steps", type=int, nargs="+", default=[None], help="one or several (default: the model's)")
    parser.add_argument("--preset", nargs="+", default=[None], help="one or several (default: the model's own settings)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a further setting of the model's kind")
    parser.add_argument("--pictures", type=int, default=5000, help="of each set (default: 5000)")
    parser.add_argument("--references", type=int, default=0, help="test pictures that all are compared with (default: all)")
    parser.add_argument("--probe", type=int, default=10_000, help="training pictures that the probe learns from (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--dtype", default="float32", help="of the model: float32 (default), bfloat16, or auto")
    parser.add_argument(
        "--cache", default="runs/measure-classes", help="folder for pictures and features (default: runs/measure-classes)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw distance and class right against guidance or steps")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="some pictures of every class")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.pictures < 2 or min(arguments.guidance) < 0:
        raise ValueError(
            f"--pictures {arguments.pictures}, --guidance {arguments.guidance}: at least 2 pictures and no negative guidance"
        )
    found = measure(arguments, lambda text: print(printable(text), file=sys.stderr, flush=True))
    print(json.dumps(found, indent=1) if arguments.json else table(found), flush=True)
    if arguments.plot is not None:
        plot(found, arguments.plot)
    return 0
