"""Tables, plots and pictures of what a study has found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitdance import load_pipeline
from bitdance.picture import grid
from lfq_tokenizer.files import whole_path
from lfq_tokenizer.json_file import read_json
from stages.engine.checkpoint import model_folder
from stages.measure.evidence.laws import AXES, groups, laws, points, power_law
from stages.measure.evidence.study import Study, folder_of, loss_of, result_of

Results = Sequence[Mapping[str, Any]]
COLUMNS = {"distance": "{:.1f}", "right": "{:.1%}", "precision": "{:.2f}", "recall": "{:.2f}", "pictures_per_s": "{:.1f}"}
SHOWN = 10  # pictures of each way, of the first classes


def read_results(study: Study) -> list[dict[str, Any]]:
    """What is done, in the study's order, the seeds of a way together."""
    paths = [result_of(study, way, seed) for way in study.ways for seed in study.seeds]
    return [read_json(path) for path in paths if path.is_file()]


def report(results: Results) -> str:
    """All tables that the results are enough for, as Markdown."""
    sampled = [result for result in results if result["rows"]]
    parts = (ways_table(sampled), steps_table(sampled), losses_table([r for r in results if not r["rows"]]), laws(results))
    return "\n\n".join(part for part in parts if part)


def best(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The generated row of the smallest distance."""
    rows: list[Mapping[str, Any]] = [row for row in result["rows"] if row["guidance"] is not None]
    return min(rows, key=lambda row: row["distance"])


def ways_table(results: Results) -> str:
    """A row for each way. Means over seeds; ± is the deviation."""
    lines = [
        "| way | parameters | pictures seen | operations | seeds | held-out loss | "
        "distance | class right | precision | recall | pictures/s | tokenizer |",
        "|---|" + "---:|" * 11,
    ]
    for name in dict.fromkeys(result["name"] for result in results):
        own = [result for result in results if result["name"] == name]
        rows, first = [best(result) for result in own], own[0]
        back = next(row for row in first["rows"] if row["name"].startswith("reconstructions"))
        guidances = "/".join(f"{value:g}" for value in dict.fromkeys(row["guidance"] for row in rows))
        cells = [f"{name}, guidance {guidances}", f"{first['parameters'] / 1e6:.2f} M", f"{first['pictures']:,}"]
        cells += [f"{first['operations']:.1e}", str(len(own)), _spread([loss_of(r["heldout"]) for r in own], "{:.3f}")]
        cells += [_spread([row[column] for row in rows], text) for column, text in COLUMNS.items()]
        lines.append("| " + " | ".join([*cells, f"{back['distance']:.1f}, {back['right']:.1%}"]) + " |")
    return "\n".join(lines) if results else ""


def _spread(values: Sequence[float | None], text: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return text.format(np.mean(known)) + (f" ± {text.format(np.std(known, ddof=1))}" if len(known) > 1 else "")


def steps_table(results: Results) -> str:
    """Of ways that were sampled with several numbers of steps: every number, as Markdown."""
    lines = ["| way, seed | steps | distance | class right | pictures/s |", "|---|---:|---:|---:|---:|"]
    for result in results:
        rows = [row for row in result["rows"] if row["guidance"] is not None]
        for row in rows if len({row["steps"] for row in rows}) > 1 else []:
            speed = "–" if row["pictures_per_s"] is None else f"{row['pictures_per_s']:.1f}"
            said = f"{result['name']}, guidance {row['guidance']:g}, seed {result['seed']}"
            lines.append(f"| {said} | {row['steps']:g} | {row['distance']:.1f} | {row['right']:.1%} | {speed} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def losses_table(results: Results) -> str:
    """Of runs that made no pictures: what they cost and the held-out loss."""
    lines = ["| way, seed | parameters | pictures seen | operations | held-out loss |", "|---|---:|---:|---:|---:|"]
    for r in results:
        cells = [f"{r['name']}, {r['seed']}", f"{r['parameters'] / 1e6:.2f} M", f"{r['pictures']:,}", f"{r['operations']:.1e}"]
        lines.append("| " + " | ".join([*cells, f"{loss_of(r['heldout']):.4f}"]) + " |")
    return "\n".join(lines) if results else ""


def plot(results: Results, path: Path) -> None:
    """Distance and class right of every way, a point for each seed; or, of runs without pictures, their power laws."""
    from matplotlib.figure import Figure

    sampled = [result for result in results if result["rows"]]
    figure = Figure(layout="constrained")
    _draw_ways(figure, sampled) if sampled else _draw_laws(figure, results)
    with whole_path(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def _draw_ways(figure: Any, results: Results) -> None:
    names = list(dict.fromkeys(result["name"] for result in results))
    figure.set_size_inches(10, 0.5 * len(names) + 1.5)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (column, title) in zip(panels, (("distance", "Lite0 distance"), ("right", "class right")), strict=True):
        for result in results:
            panel.plot(best(result)[column], names.index(result["name"]), "o", color="0.3")
        panel.set_title(title, fontsize=9)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()


def _draw_laws(figure: Any, results: Results) -> None:
    found = groups(results)
    shape = (max(1, len(found)), len(AXES))
    figure.set_size_inches(11, 3.2 * shape[0])
    panels = figure.subplots(*shape, squeeze=False)
    for row, (group, own) in zip(panels, found.items(), strict=False):
        for panel, (axis, pairs) in zip(row, points(own).items(), strict=True):
            x = [pair[0] for pair in pairs]
            panel.loglog(x, [pair[1] for pair in pairs], "o", color="0.3")
            if len(pairs) >= 3:
                a, b, _ = power_law(*zip(*pairs, strict=True))
                panel.loglog(x, [a * value**b for value in x], color="0.6")
            panel.set_title(f"{group}: {AXES[axis]}", fontsize=7)
        row[0].set_ylabel("held-out loss")


def write_pictures(study: Study, path: Path) -> None:
    """A row for each way whose model is there: a picture of each of the first classes, seeds 0, 1, …, at its best guidance.
    Nothing where there is none, as after `--done`."""
    cells = []
    for way in study.ways:
        there = (seed for seed in study.seeds if result_of(study, way, seed).is_file() and folder_of(study, way, seed).is_dir())
        seed = next(there, None)
        if seed is not None:
            row = best(read_json(result_of(study, way, seed)))
            pipe = load_pipeline(model_folder(folder_of(study, way, seed)), "cpu")
            steps = {"num_inference_steps": int(row["steps"])} if way.steps else {}
            classes = list(range(min(SHOWN, len(pipe.names))))
            cells += pipe(class_label=classes, seed=classes, guidance_scale=row["guidance"], **{**way.sample, **steps}).images
            columns = len(classes)
    if not cells:
        return
    with whole_path(path) as unfinished:
        grid(cells, columns).save(unfinished, format="png")
