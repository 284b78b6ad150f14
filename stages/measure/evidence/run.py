"""Trains and measures the runs of a study, each by the commands that a user has."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bitdance.values import shown
from lfq_tokenizer.json_file import read_json, write_json
from stages.measure.evidence.study import Study, Way, folder_of, loss_of, result_of

SMALLEST_STEPS = 2
RESULT = ("name", "group", "seed", "parameters", "operations", "steps", "pictures", "heldout", "rows")


def run(study: Study, part: tuple[int, int]) -> None:
    """Train and measure what is not done yet."""
    todo = [(way, seed) for seed in study.seeds for way in study.ways]
    for way, seed in todo[part[0] :: part[1]]:
        target = result_of(study, way, seed)
        if not target.is_file():
            write_json(_result(study, way, seed), target)
            print(f"{way.name}, seed {seed}: done", flush=True)


def take_over(study: Study, report: Path) -> None:
    """Write the results of a report as this study's own, where a run has none yet. ValueError for a report of another study."""
    told = read_json(report)
    if not isinstance(told, dict) or told.get("study") != study.title:
        said = told.get("study") if isinstance(told, dict) else told
        raise ValueError(f"{report} is of {shown(said)}; give a report of {study.title!r}")
    known = {}
    for result in told["results"] if isinstance(told.get("results"), list) else [None]:
        if not isinstance(result, dict) or not set(RESULT) <= set(result) or not _as_much(study, result):
            raise ValueError(f"{report} holds {shown(result)}, no result of as much training as {study.title!r} asks for")
        end = {"pictures": result["pictures"], "loss": loss_of(result["heldout"])}  # all that early reports say of the way to it
        known[result["name"], result["seed"]] = {"curve": [end], **result}
    Path(study.out).mkdir(parents=True, exist_ok=True)
    for way in study.ways:
        for seed in study.seeds:
            if (way.name, seed) in known and not result_of(study, way, seed).is_file():
                write_json(known[way.name, seed], result_of(study, way, seed))


def _as_much(study: Study, result: Mapping[str, Any]) -> bool:
    """Whether a run took the operations or samples that the study has, which are whole steps: not those of `--smoke`."""
    numbers = [result[name] for name in ("steps", "operations", "pictures")]
    if not result["heldout"] or not all(isinstance(number, int | float) and number > 0 for number in numbers):
        return False
    steps, operations, pictures = numbers
    took, wanted = (pictures, study.samples) if study.samples else (operations, study.operations)
    return abs(took - wanted) <= took / steps or (steps == SMALLEST_STEPS and took > wanted)


def _result(study: Study, way: Way, seed: int) -> dict[str, Any]:
    folder = folder_of(study, way, seed)
    changes = [
        *study.set,
        *way.set,
        f"run.batch_size={study.batch_size}",
        f"run.seed={seed}",
        f"run.out={json.dumps(str(folder))}",
    ]
    plan = json.loads(_bitdance("train", way.config, *_sets(changes), "--dry-run", "--json"))
    each = float(plan["flops"]["network and head"])
    samples = study.samples or study.operations / each
    steps = max(SMALLEST_STEPS, round(samples / study.batch_size))
    changes += [f"run.steps={steps}", f"run.validate_every={max(1, steps // study.validations)}", f"run.sample_every={steps}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    _bitdance("train", way.config, *_sets(changes), "--resume", "auto", show=True)
    heldout: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        if found := {name: value for name, value in json.loads(line).items() if name.startswith("heldout/")}:
            heldout[json.loads(line)["step"]] = found
    measured = json.loads(_bitdance("measure", "classes", *_measuring(study, way, folder))) if study.pictures else {"rows": []}
    return {
        "name": way.name,
        "group": way.group,
        "seed": seed,
        "parameters": sum(count for name, count in plan["parameters"].items() if "frozen" not in name),
        "operations": each * study.batch_size * steps,
        "steps": steps,
        "pictures": steps * study.batch_size,
        "heldout": heldout[steps],
        "curve": [{"pictures": step * study.batch_size, "loss": loss_of(found)} for step, found in sorted(heldout.items())],
        "rows": measured["rows"],
        "settings": dict(way.sample),
        "date": date.today().isoformat(),
    }


def _measuring(study: Study, way: Way, folder: Path) -> list[str]:
    settings = [part for name, value in way.sample.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    counts = ["--pictures", study.pictures, "--probe", study.probe, "--references", study.references]
    cache = Path(study.out) / "cache"
    guidance = ["--guidance", *map(str, way.guidance), *(["--steps", *map(str, way.steps)] if way.steps else [])]
    shards = ["--train", *study.train, "--test", *study.test]
    return ["--model", str(folder), *shards, *guidance, *settings, *map(str, counts), "--cache", str(cache), "--json"]


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
