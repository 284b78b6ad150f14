"""What the teacher does ahead of training, written as shards: its own pictures (`samples`) or its predictions (`targets`).

Both run through the row of samples that training would run through and write `FOLDER/00000/`, `FOLDER/00001/`, …, each of them a
whole pack of shards or absent. A folder that is there is skipped, so the command may be stopped and run again, and many machines
may share the work; one that other arguments wrote is an error.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from bitdance.values import shown
from distill.config import DistillConfig
from distill.context import TeacherContext
from distill.predictions import Predictions
from distill.samples import Samples
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.lock import FolderLock
from stages.data.pack import MANIFEST, PackOptions, pack
from stages.data.sample import PictureSource


@dataclass(frozen=True)
class WriteSpec:
    """What to write: `count` samples, or as many as the data has; `steps` of the sampler, or those of the teacher's defaults."""

    kind: str  # "samples" or "targets"
    out: Path
    count: int | None = None
    per_folder: int = 5000
    batch_size: int = 16
    shard: tuple[int, int] = (0, 1)
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "per_folder", "batch_size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")


def write(config: DistillConfig, spec: WriteSpec) -> int:
    """Make the folders of this shard that are missing. ValueError where data, teacher and config do not fit, or another command
    is at work on this shard."""
    context = TeacherContext(config)
    count = spec.count or len(context.mixture)
    spec.out.mkdir(parents=True, exist_ok=True)
    with FolderLock(spec.out, f".lock-{spec.shard[0]}-of-{spec.shard[1]}"):  # who has another shard is no rival
        _write(context, count, spec)
    return 0


def _write(context: TeacherContext, count: int, spec: WriteSpec) -> None:
    for number in range(spec.shard[0], -(-count // spec.per_folder), spec.shard[1]):
        folder = spec.out / f"{number:05d}"
        indices = range(number * spec.per_folder, min(count, (number + 1) * spec.per_folder))
        source: PictureSource
        if spec.kind == "samples":
            source = Samples(context, indices, spec.batch_size, spec.steps)
        else:
            source = Predictions(context, indices, spec.batch_size)
        if (folder / MANIFEST).is_file():
            check_same(folder, source, len(indices))
            print(f"{folder}: is there")
            continue
        report = pack(source, folder, PackOptions(samples_per_shard=spec.per_folder, progress=True))
        print(f"{folder}: {report['samples']} {spec.kind}")


def check_same(folder: Path, source: PictureSource, count: int) -> None:
    """ValueError for a folder that is no `count` samples of this source: those of the others would be missing, or come twice."""
    known, asked = read_json(folder / MANIFEST), json.loads(json.dumps(source.describe()))
    made = known.get("source") if isinstance(known, dict) else None
    if not isinstance(made, dict) or not isinstance(known.get("skipped"), dict):
        raise ValueError(f"{folder / MANIFEST} is no report of this command; choose another folder")
    pairs = {name: (made.get(name), wanted) for name, wanted in asked.items() if name != "sha256"}
    pairs["samples"] = (known["samples"] + sum(known["skipped"].values()), count)
    for name, (there, wanted) in pairs.items():
        if there != wanted:
            said = f"{name} = {shown(there)}, this command says {shown(wanted)}"
            raise ValueError(f"{folder} was written with {said}; remove it, or choose another folder")
