"""What a study is: its file, its ways, and where its figures go."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from bitdance.jobs.job import slug
from bitdance.values import Range
from stages.config import read_values
from stages.schema import Steps, StepsOrNone, Table, build

ANY = Annotated[Mapping[str, Any], Table(others=None)]


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
    """`operations` of training or else `samples` that are seen, `validations` on held-out pictures on the way, `pictures` that
    are generated (0: held-out losses alone), `seeds` of training, `batch_size` of all, `set` for all ways; `smoke` is the same
    study in small: other values of any of these."""

    title: str = ""
    out: str = ""
    operations: Annotated[float, Range(0, 1e24, whole=False)] = 0.0
    samples: StepsOrNone = 0
    validations: Steps = 1
    pictures: StepsOrNone = 1000
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
    if not names or len(set(names)) < len(names) or not study.out or bool(study.operations) == bool(study.samples):
        raise ValueError(f"{path}: ways with names of their own, out, and either operations or samples are needed")
    return study


def folder_of(study: Study, way: Way, seed: int) -> Path:
    """Where a run trains."""
    return Path(study.out) / f"{slug(way.name)}-{seed}"


def result_of(study: Study, way: Way, seed: int) -> Path:
    """Where the figures of a run go."""
    return Path(study.out) / f"{slug(way.name)}-{seed}.json"


def loss_of(heldout: Mapping[str, float]) -> float:
    """The held-out loss among what a run says of held-out pictures."""
    return next(value for name, value in heldout.items() if name.count("/") == 1 and name != "heldout/pictures")
