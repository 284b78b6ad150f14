"""Ways of predicting the same pictures, trained with equal numbers of operations and measured alike.

    python -m stages.measure.evidence run configs/evidence/ways.toml [--part 0/2] [--smoke]
    python -m stages.measure.evidence report configs/evidence/ways.toml --out docs/evidence

A study names ways, each a training config with changes and how it is sampled. Every way is trained once for each seed, for as
many steps as the study's operations allow (those of the network, forward and backward, as `--dry-run` counts them; encoding
pictures is not in them), and measured by `bitdance measure classes`. What is done is not done again, and training goes on where
it was stopped. `--part I/N` takes every N-th run, for processes side by side; `--smoke` is the whole way in about ten minutes,
with the study's own small numbers: its figures mean nothing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from bitdance.cli import Parser, print_page
from bitdance.jobs.job import parse_shard, slug
from bitdance.values import Range
from lfq_tokenizer.files import whole_path, write_text
from lfq_tokenizer.json_file import read_json, write_json
from stages.config import read_values
from stages.schema import Steps, StepsOrNone, Table, build

ANY = Annotated[Mapping[str, Any], Table(others=None)]
SMALLEST_STEPS = 2


@dataclass(frozen=True)
class Way:
    """`config` with the changes `set`; `sample`: settings of the pipeline beside `guidance` and `steps`, each of which is
    measured; `group`: ways of several sizes, whose power law is fitted."""

    name: str = ""
    config: str = ""
    set: tuple[str, ...] = ()
    guidance: tuple[float, ...] = (1.0,)
    steps: tuple[int, ...] = ()
    sample: ANY = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Study:
    """`operations` of training, `pictures` that are generated, `seeds` of training, `batch_size` of all, `set` for all ways;
    `smoke` is the same study in small: other values of any of these."""

    title: str = ""
    out: str = ""
    operations: Annotated[float, Range(0, 1e24, whole=False)] = 0.0
    pictures: Steps = 1000
    probe: Steps = 10_000
    references: StepsOrNone = 0  # test pictures that all are compared with; 0: all
    batch_size: Steps = 64
    seeds: tuple[int, ...] = (1,)
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    ways: tuple[Way, ...] = ()
    smoke: ANY = field(default_factory=dict)


def read_study(path: Path, smoke: bool) -> Study:
    """ValueError names the key that is not known, or what two ways share."""
    values = read_values(path, ())
    if smoke:
        values = {**values, **values.get("smoke", {}), "out": str(values.get("out", "")) + "-smoke"}
    try:
        study: Study = build(Study, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    names = [slug(way.name) for way in study.ways]
    if not names or len(set(names)) < len(names) or not study.out or not study.operations:
        raise ValueError(f"{path}: ways with names of their own, out and operations are needed")
    return study


def run(study: Study, part: tuple[int, int]) -> None:
    """Train and measure what is not done yet."""
    todo = [(way, seed) for seed in study.seeds for way in study.ways]
    for way, seed in todo[part[0] :: part[1]]:
        target = result_of(study, way, seed)
        if not target.is_file():
            write_json(_result(study, way, seed), target)
            print(f"{way.name}, seed {seed}: done", flush=True)


def result_of(study: Study, way: Way, seed: int) -> Path:
    """Where the figures of a run go."""
    return Path(study.out) / f"{slug(way.name)}-{seed}.json"


def _result(study: Study, way: Way, seed: int) -> dict[str, Any]:
    folder = Path(study.out) / f"{slug(way.name)}-{seed}"
    changes = [
        *study.set,
        *way.set,
        f"run.batch_size={study.batch_size}",
        f"run.seed={seed}",
        f"run.out={json.dumps(str(folder))}",
    ]
    plan = json.loads(_bitdance("train", way.config, *_sets(changes), "--dry-run", "--json"))
    each = float(plan["flops"]["network and head"])
    steps = max(SMALLEST_STEPS, round(study.operations / (each * study.batch_size)))
    changes += [f"run.steps={steps}", f"run.validate_every={steps}", f"run.sample_every={steps}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    _bitdance("train", way.config, *_sets(changes), "--resume", "auto", show=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    heldout = {
        name: value for row in rows if row.get("step") == steps for name, value in row.items() if name.startswith("heldout/")
    }
    measured = json.loads(_bitdance("measure", "classes", *_measuring(study, way, folder)))
    return {
        "name": way.name,
        "group": way.group,
        "seed": seed,
        "parameters": sum(count for name, count in plan["parameters"].items() if "frozen" not in name),
        "operations": each * study.batch_size * steps,
        "steps": steps,
        "pictures": steps * study.batch_size,
        "heldout": heldout,
        "rows": measured["rows"],
        "settings": dict(way.sample),
        "date": date.today().isoformat(),
    }


def _measuring(study: Study, way: Way, folder: Path) -> list[str]:
    settings = [part for name, value in way.sample.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    counts = [
        "--pictures",
        str(study.pictures),
        "--probe",
        str(study.probe),
        "--references",
        str(study.references),
        "--cache",
        str(Path(study.out) / "cache"),
        "--json",
    ]
    guidance = ["--guidance", *map(str, way.guidance), *(["--steps", *map(str, way.steps)] if way.steps else [])]
    return ["--model", str(folder), "--train", *study.train, "--test", *study.test, *guidance, *settings, *counts]


def _sets(changes: Sequence[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def _bitdance(*arguments: str, show: bool = False) -> str:
    """Standard output of a command; `show` lets it through instead. ChildProcessError where it fails."""
    command = [sys.executable, "-m", "bitdance", *arguments]
    done = subprocess.run(command, stdout=None if show else subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(
            f"{' '.join(command[2:])[:400]} ended with {done.returncode}; the same command goes on from there"
        )
    return done.stdout or ""


def best(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The generated row of the smallest distance."""
    rows: list[Mapping[str, Any]] = [row for row in result["rows"] if row["guidance"] is not None]
    return min(rows, key=lambda row: row["distance"])


def report(study: Study) -> tuple[str, list[dict[str, Any]]]:
    """A table of what is done, ways in the study's order, and the results. Means over seeds; ± is the deviation."""
    lines = [
        "| way | parameters | pictures seen | seeds | distance | class right | precision | recall | pictures/s | tokenizer |",
        "|---|" + "---:|" * 9,
    ]
    found = []
    for way in study.ways:
        results = [read_json(path) for seed in study.seeds if (path := result_of(study, way, seed)).is_file()]
        if not results:
            continue
        found += results
        rows, first = [best(result) for result in results], results[0]
        back = next(row for row in first["rows"] if row["name"].startswith("reconstructions"))
        cells = [f"{way.name}, guidance {rows[0]['guidance']:g}", f"{first['parameters'] / 1e6:.2f} M", f"{first['pictures']:,}"]
        cells += [str(len(results)), *(_spread([row[name] for row in rows], text) for name, text in _COLUMNS.items())]
        lines.append("| " + " | ".join([*cells, f"{back['distance']:.1f}, {back['right']:.1%}"]) + " |")
    return "\n".join(lines), found


_COLUMNS = {"distance": "{:.1f}", "right": "{:.1%}", "precision": "{:.2f}", "recall": "{:.2f}", "pictures_per_s": "{:.1f}"}


def _spread(values: Sequence[float | None], text: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return text.format(np.mean(known)) + (f" ± {text.format(np.std(known, ddof=1))}" if len(known) > 1 else "")


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """y = a·x^b by least squares of the logarithms → (a, b, standard error of b). ValueError for fewer than three points."""
    if len(x) < 3:
        raise ValueError(f"{len(x)} points; a power law and its error need at least 3")
    (b, log_a), covariance = np.polyfit(np.log(x), np.log(y), 1, cov="unscaled")
    residual = np.log(y) - (b * np.log(x) + log_a)
    error = float(np.sqrt(covariance[0, 0] * (residual @ residual) / max(1, len(x) - 2)))
    return float(np.exp(log_a)), float(b), error


def steps_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Of ways that were sampled with several numbers of steps: every number, as Markdown."""
    lines = ["| way, seed | steps | distance | class right | pictures/s |", "|---|---:|---:|---:|---:|"]
    for result in results:
        rows = [row for row in result["rows"] if row["guidance"] is not None]
        for row in rows if len({row["steps"] for row in rows}) > 1 else []:
            speed = "–" if row["pictures_per_s"] is None else f"{row['pictures_per_s']:.1f}"
            said = f"{result['name']}, guidance {row['guidance']:g}, seed {result['seed']}"
            lines.append(f"| {said} | {row['steps']:g} | {row['distance']:.1f} | {row['right']:.1%} | {speed} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def laws(results: Sequence[Mapping[str, Any]]) -> str:
    """For each group of at least three sizes: held-out loss against parameters, as Markdown."""
    lines = ["| group | held-out loss ~ parameters | sizes |", "|---|---|---:|"]
    for group in dict.fromkeys(result["group"] for result in results if result["group"]):
        pairs = sorted((result["parameters"], _loss(result)) for result in results if result["group"] == group)
        if len(pairs) >= 3:
            a, b, error = power_law(*zip(*pairs, strict=True))
            lines.append(f"| {group} | {a:.3g}·N^({b:.3f} ± {error:.3f}) | {len(pairs)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _loss(result: Mapping[str, Any]) -> float:
    heldout = result["heldout"]
    return float(next(value for name, value in heldout.items() if name.count("/") == 1 and name != "heldout/pictures"))


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Distance and class right of every way, a point for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["name"] for result in results))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 0.5 * len(names) + 1.5), sharey=True, layout="constrained")
    for panel, (column, title) in zip(panels, (("distance", "Lite0 distance"), ("right", "class right")), strict=True):
        for result in results:
            panel.plot(best(result)[column], names.index(result["name"]), "o", color="0.3")
        panel.set_title(title, fontsize=9)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    with whole_path(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run or report a study."""
    parser = Parser(prog="python -m stages.measure.evidence", description="Ways of predicting the same pictures, compared.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and measure what is not done yet")
    telling = commands.add_parser("report", help="table and plot of what is done")
    for command in (running, telling):
        command.add_argument("study", type=Path, help="a study of configs/evidence")
        command.add_argument("--smoke", action="store_true", help="the study in small, to see that all of it works")
    running.add_argument("--part", default="0/1", metavar="I/N")
    telling.add_argument("--out", type=Path, help="folder for NAME.md, NAME.json and NAME.png")
    arguments: argparse.Namespace = parser.parse_args(argv)
    study = read_study(arguments.study, arguments.smoke)
    if arguments.command == "run":
        run(study, parse_shard(arguments.part))
        return 0
    text, results = report(study)
    if not results:
        raise ValueError(f"{study.out} holds no results; start with: python -m stages.measure.evidence run {arguments.study}")
    text = "\n\n".join(part for part in (text, steps_table(results), laws(results)) if part)
    print_page(text.splitlines())
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = arguments.study.stem
        write_text(text + "\n", arguments.out / f"{name}.md")
        write_json({"study": study.title, "results": results}, arguments.out / f"{name}.json")
        plot(results, arguments.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    from stages.command import guarded

    sys.exit(guarded("python -m stages.measure.evidence", main, None))
