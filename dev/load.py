"""How much `bitdance serve` makes, and how long a request takes, on this machine over loopback:

    python dev/load.py [--model demo] [--batch-size 8] [--clients 1 4 8 16] [--requests 48] [--load 0.7] [--json out/load.json]

Twice, with batches of one picture and of `--batch-size`: a server is started, warmed by one request, and then asked
- by so many clients, each of which asks again as soon as it has its picture, `--requests` in all: pictures per second;
- by as many that arrive at random (Poisson, seed 0) at `--load` times the most that batches of one can bear, the same
  rate for both servers.
Of each it says the seconds that 50, 95 and 99 % of the requests do not exceed. Each has a seed of its own. Only loopback is
spoken to; each server ends after `--seconds` at most.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from served import Server

PROMPTS = ("a fox", "a red apple on a wooden table", "a blue bird, 3D style, in front of tall green mountains", "a ship")


def main() -> int:
    """Measure, print a table, write the JSON. Exit code 1 where a request failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16], help="that ask at the same time")
    parser.add_argument("--requests", type=int, default=48, help="for each number of clients")
    parser.add_argument("--load", type=float, default=0.7, help="arrivals, as a share of the throughput of batches of one")
    parser.add_argument("--seconds", type=float, default=1200, help="for each server, at most")
    parser.add_argument("--fields", type=json.loads, default={}, help='of every request: {"size": "96x96", "steps": 5}')
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in dict.fromkeys((1, options.batch_size)):
        best = max((row["pictures_per_second"] for row in rows), default=None)
        rows += asyncio.run(measured(options, size, best))
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": options.model,
        "fields": options.fields,
        "rows": rows,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(row["failed"] for row in rows) else 0


async def measured(options: argparse.Namespace, batch_size: int, best: float | None) -> list[dict[str, Any]]:
    """The rows of one server. `best`: pictures per second of batches of one, None where these are it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.model, options.requests + 1, batch_size, Path(folder) / "log")
        url, many = await server.start(), httpx.Limits(max_connections=None)
        try:
            async with (
                asyncio.timeout(options.seconds),
                httpx.AsyncClient(base_url=url, timeout=options.seconds, limits=many) as client,
            ):
                await asked(client, options, 1, in_turn(1))
                for clients in options.clients:
                    rows.append(await asked(client, options, options.requests, in_turn(clients)))
                    told(rows[-1], batch_size, f"{clients} clients")
                rate = options.load * (best or max(row["pictures_per_second"] for row in rows))
                rows.append(await asked(client, options, options.requests, at_random(rate)))
                told(rows[-1], batch_size, f"{rate:.3f} requests/s")
        finally:
            await server.stop()
    return rows


Turn = Callable[[int, Callable[[], Awaitable[None]]], Awaitable[None]]


async def asked(client: httpx.AsyncClient, options: argparse.Namespace, requests: int, turn: Turn) -> dict[str, Any]:
    """Ask so often, each request in its turn: pictures per second, seconds of a request, failures."""
    failed: list[int] = []
    waits: list[float] = []

    async def one(number: int) -> None:
        fields = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, **options.fields}

        async def ask() -> None:
            start = time.monotonic()
            answer = await client.post("/v1/images/generations", json=fields)
            waits.append(time.monotonic() - start)
            if answer.status_code != 200:
                failed.append(answer.status_code)

        await turn(number, ask)

    start = time.monotonic()
    await asyncio.gather(*map(one, range(requests)))
    return {"pictures_per_second": requests / (time.monotonic() - start), "seconds": quantiles(sorted(waits)), "failed": failed}


def in_turn(clients: int) -> Turn:
    """So many at a time."""
    places = asyncio.Semaphore(clients)

    async def turn(_: int, ask: Callable[[], Awaitable[None]]) -> None:
        async with places:
            await ask()

    return turn


def at_random(rate: float) -> Turn:
    """Poisson arrivals, per second."""
    draw, arrivals = random.Random(0), [0.0]

    async def turn(number: int, ask: Callable[[], Awaitable[None]]) -> None:
        while len(arrivals) <= number:
            arrivals.append(arrivals[-1] + draw.expovariate(rate))
        await asyncio.sleep(arrivals[number])
        await ask()

    return turn


def told(row: dict[str, Any], batch_size: int, load: str) -> None:
    """Print a row, and note in it what was measured."""
    row |= {"batch_size": batch_size, "load": load}
    seconds = " | ".join(f"{value:.1f}" for value in row["seconds"].values())
    print(f"| {batch_size} | {load} | {row['pictures_per_second']:.2f} | {seconds} |", flush=True)


def quantiles(sorted_seconds: list[float]) -> dict[str, float]:
    """The smallest value that so many per cent of the requests do not exceed."""
    count = len(sorted_seconds)
    return {f"{share} %": sorted_seconds[max(0, -(-share * count // 100) - 1)] for share in (50, 95, 99)}


if __name__ == "__main__":
    sys.exit(main())
