"""How much a client may ask for, and how long things are kept. One place for the whole server."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bitdance.values import RANGES as NUMBERS
from bitdance.values import Range, shown

_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:_-]+")  # of a page, an extension, or a file

RANGES = {
    "queue": NUMBERS["queue"],
    "batch_size": NUMBERS["batch_size"],
    "pictures": Range(1, 10),  # OpenAI's most
    "pixels": Range(1, 1 << 32),
    "body_bytes": Range(1, 1 << 32),
    "seconds": NUMBERS["time_limit"],
    "body_seconds": Range(0, 1e6, whole=False, open_low=True),
    "kept_jobs": Range(1, 100_000),
    "kept_seconds": Range(0, 1e6, whole=False),
    "kept_bytes": Range(0, 1 << 40),
    "preview_share": Range(0, 1e9, whole=False),
}


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """The origins of pages as browsers send them. ValueError for what no browser sends, which would have no effect."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"--cors {shown(origin)}; an origin is allowed, as https://pages.example or http://127.0.0.1:8000")
    return tuple(origins)


@dataclass(frozen=True)
class Limits:
    """What the server allows. ValueError names a field and what is allowed.

    queue          requests that wait; one more is answered with 429
    batch_size     pictures that are made at once
    pictures       of one request
    pixels         of one picture, asked for or uploaded
    body_bytes     of one request, as it arrives
    body_seconds   until all of it must have arrived
    seconds        for one request, waiting included; then it ends with 408
    kept_jobs, kept_seconds, kept_bytes   how many finished requests can be fetched again, for how long, in how much memory
    preview_share  share of a batch's time that previews may take: each costs a decode
    """

    queue: int = 64
    batch_size: int = 8
    pictures: int = 10
    pixels: int = 4 << 20
    body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    seconds: float = 600.0
    kept_jobs: int = 100
    kept_seconds: float = 600.0
    kept_bytes: int = 256 << 20
    preview_share: float = 0.2

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
