"""Does `bitdance serve` keep its promises for long? A real process, asked over loopback by clients of every kind:

    python dev/soak.py [--requests 1000] [--restarts 2] [--clients 24] [--json out/soak.json]

Pictures of two sizes, plain, streamed and several at once; jobs that are fetched after their client left, and others that are
cancelled; connections that are closed midway; bad input of every kind; SIGTERM while requests run, and a new server at the same
address, to which the clients come back. What it holds the server to:
- every request ends in its pictures, in the refusal that it deserves, or because it was cancelled or its client left;
- every PNG has the pixels that `bitdance generate` makes with the same seed, whoever shared its batch;
- SIGTERM: what was begun is finished, what waits gets 503, the exit code is 143, and the log has no word but that;
- the last server, which sees most of the requests, takes no more memory than after its first hundred, and no more descriptors
  than before any.
It prints what was counted; the exit code is 1 where a promise was broken, or it was not finished after `--seconds`.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image
from served import ENVIRONMENT, Server

PATH = "/v1/images/generations"
PROMPTS = ("a fox", "a blue bird, 3D style, in front of a very tall green mountain")
SEEDS = 8
KEY = "soak"
Pictures = dict[tuple[str, str, int], bytes]  # prompt, size and seed → pixels
MIX = {"plain": 26, "stream": 12, "several": 6, "job": 6, "cancelled": 10, "left": 14, "bad": 26}
FILES = ("png", "png", "png", "webp", "jpeg")
GROWN_MB, GROWN_FILES = 64, 4  # what the last server may take at the end more than after a hundred requests, and than an idle one

OK = {"prompt": "a fox", "seed": 1}
WRONG: dict[str, tuple[Any, ...]] = {
    "size": ("65x64", "huge", 64),
    "n": (0, 11, "2"),
    "seed": (-1, 1.5),
    "steps": (0, 10**9),
    "guidance": ("much",),
    "preset": ("no", "quick"),
    "sampler": ("no",),
    "stpes": (3,),
    "job": ("../x",),
    "stream": (1,),
    "partial_images": (4,),
    "output_format": ("gif",),
    "tau": (1,),
    "class_label": (1,),
    "background": ("transparent",),
    "prompt": (None, 3),
}
BAD: list[tuple[int, dict[str, Any]]] = [(400, {"json": OK | {name: value}}) for name in WRONG for value in WRONG[name]]
BAD += [(400, {"content": body}) for body in (b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 50_000)]
BAD += [(400, {"json": OK, "headers": {"content-type": "text/plain"}})]
BAD += [(400, {"url": "/v1/images/edits", "files": {"image": b"no picture"}})]
BAD += [(401, {"json": OK, "headers": {"authorization": "Bearer wrong"}})]
BAD += [(403, {"json": OK, "headers": {"origin": "https://elsewhere.example"}})]
BAD += [(404, {"method": "GET", "url": "/v1/jobs/nothing-of-that-name"}), (404, {"json": OK, "url": "/v1/images/variations"})]
BAD += [(405, {"method": "PUT", "json": OK}), (413, {"content": b" " * (3 << 20)})]


class Answer(NamedTuple):
    """What came back: the status (of a stream that ends with an error, that of the error), the error, pictures (seed, base64)."""

    status: int
    headers: httpx.Headers
    error: dict[str, Any] | None
    pictures: list[tuple[int, str]]

    @property
    def code(self) -> str | None:
        """OpenAI's error code."""
        return None if self.error is None else self.error["code"]


class Soak:
    """All requests, and what became of them."""

    def __init__(self, options: argparse.Namespace, server: Server, wanted: Pictures, url: str) -> None:
        self.options, self.server, self.wanted = options, server, wanted
        self.to: dict[str, Any] = {"base_url": url, "timeout": 300, "headers": {"authorization": f"Bearer {KEY}"}}
        self.ends: Counter[tuple[str, str]] = Counter()
        self.repeats: Counter[str] = Counter()  # why a client had to come back
        self.at_stops: list[Counter[str]] = []  # what those were told who had asked before a SIGTERM
        self.broken: list[str] = []
        self.weights: list[dict[str, float]] = []
        self.compared = 0

    async def run(self) -> None:
        """Ask everything."""
        self.client = httpx.AsyncClient(**self.to, limits=httpx.Limits(max_connections=None))
        async with self.client:
            await self._sent({"prompt": PROMPTS[0]})
            self._weigh(0)
            draw = random.Random(0)
            self._numbers = iter(range(self.options.requests))
            kinds = draw.choices(list(MIX), list(MIX.values()), k=self.options.requests)
            stops = [round(self.options.requests * 0.15 * (i + 1)) for i in range(self.options.restarts)]
            async with asyncio.TaskGroup() as group:
                group.create_task(self._restarts(stops))
                for _ in range(self.options.clients):
                    group.create_task(self._client(kinds, draw))
        await self._settled()

    async def _client(self, kinds: list[str], draw: random.Random) -> None:
        for number in self._numbers:
            kind = kinds[number]
            try:
                self.ends[kind, await getattr(self, f"_{kind}")(number, draw)] += 1
            except Exception as error:
                self.ends[kind, "lost"] += 1
                self.broken.append(f"request {number}, {kind}: {type(error).__name__}: {error}")
            if (done := self.ends.total()) % 100 == 0:
                self._weigh(done)

    def _weigh(self, done: int) -> None:
        if not self.server.was_away(time.monotonic()):
            row = {"requests": done, "server": self.server.starts, **self.server.weight()}
            self.weights.append(row)
            print(row, flush=True)

    # one request of each kind → how it ended
    def _fields(self, draw: random.Random, n: int = 1) -> dict[str, Any]:
        size, seed = draw.choice(self.options.sizes), draw.randrange(SEEDS + 1 - n)
        fields = {"prompt": draw.choice(PROMPTS), "size": size, "seed": seed, "n": n, "steps": self.options.steps}
        return fields | {"output_format": draw.choice(FILES)}

    async def _plain(self, number: int, draw: random.Random) -> str:
        return self._right(fields := self._fields(draw), await self._sent(fields))

    async def _several(self, number: int, draw: random.Random) -> str:
        fields = self._fields(draw, draw.randint(2, 4)) | {"stream": draw.random() < 0.3}
        return self._right(fields, await self._sent(fields))

    async def _stream(self, number: int, draw: random.Random) -> str:
        fields = self._fields(draw) | {"stream": True, "partial_images": draw.randrange(3)}
        return self._right(fields, await self._sent(fields))

    async def _left(self, number: int, draw: random.Random) -> str:
        fields = self._fields(draw, draw.randint(1, 2)) | {"stream": draw.random() < 0.5}
        try:
            async with asyncio.timeout(draw.choice((0.02, 0.5, 2, 5))):
                return self._right(fields, await self._sent(fields))
        except TimeoutError:
            return "left"

    async def _cancelled(self, number: int, draw: random.Random) -> str:
        """The id is deleted over another connection, as soon as the server knows it and a little later."""
        fields = self._fields(draw) | {"job": f"cancelled-{number}", "stream": draw.random() < 0.3}
        asked = asyncio.create_task(self._sent(fields))
        await self._until_known(fields["job"], asked)
        await asyncio.sleep(draw.choice((0, 0.5, 2)))
        deleted = None if asked.done() else await self._reached("DELETE", f"/v1/jobs/{fields['job']}")
        answer = await asked
        if answer.status == 200 and (deleted is None or deleted.json().get("status") != "cancelled"):
            return self._right(fields, answer)  # it was finished first, or taken in by the next server
        assert (answer.status, answer.code) == (409, "cancelled"), f"{answer.status} {answer.error}, though deleted"
        assert answer.headers.get("x-should-retry", "false") == "false"
        return "cancelled"

    async def _job(self, number: int, draw: random.Random) -> str:
        """Its client leaves, comes back, and asks for the id until it is done. Jobs end with their server: then once more."""
        fields = self._fields(draw) | {"job": f"fetched-{number}"}
        while True:
            asked = asyncio.create_task(self._sent(fields))
            await self._until_known(fields["job"], asked)
            server = self.server.starts
            asked.cancel()
            await asyncio.wait([asked])
            while (answer := await self._reached("GET", f"/v1/jobs/{fields['job']}")).status_code == 200:
                state = answer.json()
                if state["status"] == "done":
                    return self._right(fields, _answer(200, answer.headers, state["result"]))
                if state["status"] == "failed":
                    assert state["error"]["code"] == "stopping", state["error"]
                    break
                await asyncio.sleep(1)
            else:
                assert self.server.starts > server or self.server.was_away(time.monotonic()), answer.text
            self.repeats["job of an earlier server"] += 1
            await asyncio.sleep(1)

    async def _bad(self, number: int, draw: random.Random) -> str:
        status, request = BAD[number % len(BAD)]
        request = {"method": "POST", "url": PATH, **request}
        if "content" in request:
            request["headers"] = {"content-type": "application/json"}
        answer = await self._reached(**request)
        assert answer.status_code == status, f"{request}: {answer.status_code} {answer.text[:200]}, not {status}"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
        return str(status)

    # what they are made of
    async def _until_known(self, job: str, asked: asyncio.Task[Answer]) -> None:
        while not asked.done() and (await self._reached("GET", f"/v1/jobs/{job}")).status_code == 404:
            await asyncio.sleep(0.3)

    async def _sent(self, fields: dict[str, Any]) -> Answer:
        """Ask until there is an answer that stands, as OpenAI's client does: 429 and 503 say when to come back."""
        while True:
            start, server = time.monotonic(), self.server.starts
            try:
                answer = await self._asked(fields)
            except httpx.TransportError as error:
                self._excuse(start, error)
                await asyncio.sleep(2)
                continue
            stopped = self.server.away[-1][0] if self.server.away else float("inf")
            if start < stopped and self.server.was_away(time.monotonic()) and self.server.starts == server:
                self.at_stops[-1][str(answer.status)] += 1
            if answer.status not in (429, 503):
                return answer
            assert answer.code in ("queue_full", "stopping"), answer.error
            self.repeats[f"{answer.status} {answer.code}"] += 1
            await asyncio.sleep(min(5, int(answer.headers.get("retry-after", 5))))  # a stream's headers are gone by then

    async def _asked(self, fields: dict[str, Any]) -> Answer:
        async with self.client.stream("POST", PATH, json=fields) as answer:
            if not answer.headers["content-type"].startswith("text/event-stream"):
                await answer.aread()
                if answer.status_code in (429, 503):
                    assert int(answer.headers["retry-after"]) >= 1 and answer.headers["x-should-retry"] == "true"
                return _answer(answer.status_code, answer.headers, answer.json())
            found = []
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    if event["type"] == "error":
                        status = {"stopping": 503, "cancelled": 409}.get(event["error"]["code"], 500)
                        return Answer(status, answer.headers, event["error"], [])
                    if event["type"] == "image_generation.completed":
                        found.append((event["seed"], event["b64_json"]))
            return Answer(200, answer.headers, None, found)

    async def _reached(self, method: str, url: str, **more: Any) -> httpx.Response:
        """An answer, from the next server where this one is away."""
        while True:
            start = time.monotonic()
            try:
                return await self.client.request(method, url, **more)
            except httpx.TransportError as error:
                self._excuse(start, error)
                await asyncio.sleep(2)

    def _excuse(self, start: float, error: Exception) -> None:
        """No answer is right only for who asks a server that was told to stop."""
        if not self.server.was_away(start):
            raise error
        self.repeats["no server"] += 1

    def _right(self, fields: dict[str, Any], answer: Answer) -> str:
        assert answer.status == 200, f"{answer.status} {answer.error}"
        seeds = [fields["seed"] + i for i in range(fields["n"])]
        assert [seed for seed, _ in answer.pictures] == seeds, f"pictures of {[s for s, _ in answer.pictures]}, not {seeds}"
        for seed, text in answer.pictures:
            image = Image.open(io.BytesIO(base64.b64decode(text)))
            width, height = map(int, fields["size"].split("x"))
            assert image.size == (width, height) and image.format == fields["output_format"].upper()
            if image.format == "PNG":
                same = pixels(image) == self.wanted[fields["prompt"], fields["size"], seed]
                assert same, f"not the command's picture: {fields}, seed {seed}"
                self.compared += 1
            else:
                image.load()
        return "pictures"

    async def _restarts(self, stops: list[int]) -> None:
        """At each count of requests: wait until some run and others wait, SIGTERM, start again."""
        for count in stops:
            while self.ends.total() < count:
                await asyncio.sleep(0.05)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                state = (await self.client.get("/health")).json()
                if state["running"] and state["waiting"]:
                    break
                await asyncio.sleep(0.1)
            self.at_stops.append(Counter())
            self._hold(await self.server.stop() == 143, "the exit code after SIGTERM is not 143")
            print(f"stopped with {state}: those who had asked before were told {dict(self.at_stops[-1])}", flush=True)
            told = self.at_stops[-1]
            self._hold(not state["running"] or told["200"] > 0, "SIGTERM: what ran was not finished")
            self._hold(not state["waiting"] or told["503"] > 0, "SIGTERM: what waited was not refused")
            await self.server.start()

    async def _settled(self) -> None:
        """All clients are gone: nothing waits or runs, every picture is accounted for, and nothing has grown."""
        async with httpx.AsyncClient(**self.to) as client:
            for _ in range(100):
                state = (await client.get("/health")).json()
                if not state["running"] and not state["waiting"]:
                    break
                await asyncio.sleep(0.1)
            self._hold(state == {"status": "ok", "waiting": 0, "running": 0}, f"at the end: {state}")
            figures = (await client.get("/metrics")).text
        self._hold('outcome="failed"' not in figures, "pictures failed")
        self._weigh(self.ends.total())
        last = [row for row in self.weights if row["server"] == self.server.starts]
        idle = self.weights[0]  # the first server, before it was asked for more than one picture
        grown = {"rss_mb": last[-1]["rss_mb"] - last[0]["rss_mb"], "files": last[-1]["files"] - idle["files"]}
        self._hold(grown["rss_mb"] <= GROWN_MB and grown["files"] <= GROWN_FILES, f"the server has grown by {grown}")
        self._hold(await self.server.stop() == 143, "the last exit code is not 143")
        log = self.server.log.read_text()
        stopped = ["bitdance: stopped: what was begun is finished, what waited was refused\n"] * self.server.starts
        said = [line for line in log.splitlines(keepends=True) if "the model was never taught" not in line]
        self._hold(said == stopped, f"the server's log says:\n{log}")

    def _hold(self, kept: bool, otherwise: str) -> None:
        self.broken += [] if kept else [otherwise]


def _answer(status: int, headers: httpx.Headers, body: dict[str, Any]) -> Answer:
    pictures = zip(body.get("seeds", ()), (one["b64_json"] for one in body.get("data", ())), strict=True)
    return Answer(status, headers, body.get("error"), list(pictures))


def pixels(image: Image.Image) -> bytes:
    """Its bytes in RGB."""
    return np.asarray(image.convert("RGB")).tobytes()


def pictures_of_the_command(options: argparse.Namespace, folder: Path) -> Pictures:
    """What `bitdance generate` makes of every prompt, size and seed: pixels."""
    asked = folder / "asked.jsonl"
    sides = [tuple(map(int, size.split("x"))) for size in dict.fromkeys(options.sizes)]
    lines = [json.dumps({"prompt": prompt, "width": width, "height": height}) for width, height in sides for prompt in PROMPTS]
    asked.write_text("\n".join(lines))
    command = [sys.executable, "-m", "bitdance", "generate", "--prompts", str(asked), "--model", options.model, "--device", "cpu"]
    command += ["--steps", str(options.steps), "--seed", *map(str, range(SEEDS)), "-o", str(folder / "wanted"), "-q"]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    found = {}
    for line in (folder / "wanted" / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        image = Image.open(folder / "wanted" / row["file"])
        found[row["prompt"], f"{image.width}x{image.height}", row["seed"]] = pixels(image)
    return found


async def soaked(options: argparse.Namespace, folder: Path) -> Soak:
    """Everything that `main` prints."""
    wanted = pictures_of_the_command(options, folder)
    server = Server(options.model, options.queue, options.batch_size, folder / "server.log", KEY)
    soak = Soak(options, server, wanted, await server.start())
    try:
        async with asyncio.timeout(options.seconds):
            await soak.run()
    except TimeoutError:
        soak.broken.append(f"not finished within {options.seconds:g} s")
    finally:
        await server.kill()
    return soak


def main() -> int:
    """Run, print, write the JSON. Exit code 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sizes", nargs="+", default=["64x64", "64x64", "96x96"], help="each request draws one of them")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--clients", type=int, default=24, help="that ask at the same time")
    parser.add_argument("--queue", type=int, default=12, help="of the server: fewer than clients, so that it is full at times")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2400, help="at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = asyncio.run(soaked(options, Path(folder)))
    found = {
        "requests": soak.ends.total(),
        "seconds": round(time.monotonic() - start),
        "ends": {f"{kind}: {end}": count for (kind, end), count in sorted(soak.ends.items())},
        "came_back_because": dict(soak.repeats),
        "told_at_stops": [dict(one) for one in soak.at_stops],
        "pngs_equal_to_the_command_s": soak.compared,
        "server": soak.weights,
        "broken": soak.broken,
    }
    print(json.dumps({name: value for name, value in found.items() if name != "server"}, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if soak.broken or soak.ends.total() < options.requests else 0


if __name__ == "__main__":
    sys.exit(main())
