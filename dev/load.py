"""How much `bitdance serve` makes, and how long a request takes, on this machine over loopback:

    python dev/load.py [--model demo] [--batch-size 8] [--requests 48] [--load 0.7] [--json out/load.json]

Twice, with batches of one picture and of `--batch-size`: a server is started, warmed by one request, and then
- throughput: `--requests` requests by so many clients that a batch and the next one are always full; pictures per second;
- latency: as many requests that arrive at random (Poisson, seed 0) at `--load` times the throughput of batches of one, the same
  rate for both servers; seconds at 50, 95 and 99 % of the requests.
Every request has a seed of its own. Nothing but the loopback is spoken to; each server ends after `--seconds` at most.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a fox", "a red apple on a wooden table", "a blue bird, 3D style, in front of tall green mountains", "a ship")


def main() -> int:
    """Measure, print a table, write the JSON. Exit code 1 where a request failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--load", type=float, default=0.7, help="arrivals, as a share of the throughput of batches of one")
    parser.add_argument("--seconds", type=float, default=900, help="for each server, at most")
    parser.add_argument("--fields", type=json.loads, default={}, help='of every request: {"size": "96x96", "steps": 5}')
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": options.model,
        "fields": options.fields,
        "requests": options.requests,
        "load": options.load,
        "batches": {},
    }
    rate = None
    for size in (1, options.batch_size):
        one = measured(options, size, rate)
        rate = rate or one["arrivals_per_second"]
        found["batches"][size] = one
        seconds = ", ".join(f"{name} {value:.2f} s" for name, value in one["latency_seconds"].items())
        print(f"batch {size}: {one['pictures_per_second']:.3f} pictures/s; at {rate:.3f} requests/s: {seconds}", flush=True)
    speeds = [one["pictures_per_second"] for one in found["batches"].values()]
    found["gain"] = speeds[-1] / speeds[0]
    print(f"gain of batches: {found['gain']:.2f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(one["failed"] for one in found["batches"].values()) else 0


def measured(options: argparse.Namespace, batch_size: int, rate: float | None) -> dict[str, Any]:
    """One server, started and ended."""
    command = [sys.executable, "-m", "bitdance", "serve", "--model", options.model, "--port", "0"]
    command += ["--batch-size", str(batch_size), "--queue", str(options.requests + 1)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline().split()
            if not line:
                raise SystemExit("the server did not start")
            return asyncio.run(asked(line[-1], options, batch_size, rate))
        finally:
            server.terminate()
            server.wait(60)


async def asked(url: str, options: argparse.Namespace, batch_size: int, rate: float | None) -> dict[str, Any]:
    """Throughput, then latency."""
    failed: list[int] = []

    async def ask(number: int) -> float:
        fields = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, **options.fields}
        start = time.monotonic()
        answer = await client.post("/v1/images/generations", json=fields)
        if answer.status_code != 200:
            failed.append(answer.status_code)
        return time.monotonic() - start

    many = httpx.Limits(max_connections=None)
    async with asyncio.timeout(options.seconds), httpx.AsyncClient(base_url=url, timeout=options.seconds, limits=many) as client:
        await ask(0)
        places = asyncio.Semaphore(2 * batch_size)

        async def in_turn(number: int) -> None:
            async with places:
                await ask(number)

        start = time.monotonic()
        await asyncio.gather(*(in_turn(number) for number in range(options.requests)))
        speed = options.requests / (time.monotonic() - start)
        rate, draw, at = rate or options.load * speed, random.Random(0), 0.0
        arrivals = []
        for number in range(options.requests):
            at += draw.expovariate(rate)
            arrivals.append(asyncio.create_task(_later(at, ask, number)))
        waits = sorted(await asyncio.gather(*arrivals))
    return {
        "pictures_per_second": speed,
        "arrivals_per_second": rate,
        "latency_seconds": quantiles(waits),
        "failed": failed,
    }


async def _later(seconds: float, ask: Any, number: int) -> float:
    await asyncio.sleep(seconds)
    return float(await ask(number))


def quantiles(sorted_seconds: list[float]) -> Mapping[str, float]:
    """The smallest value that so many per cent of the requests do not exceed."""
    count = len(sorted_seconds)
    return {f"{share} %": sorted_seconds[max(0, -(-share * count // 100) - 1)] for share in (50, 95, 99)}


if __name__ == "__main__":
    sys.exit(main())
