"""A `bitdance serve` process that `load.py` and `soak.py` ask over loopback."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


class Server:
    """A server that can be stopped, and started again at its address."""

    def __init__(self, model: str, queue: int, batch_size: int, log: Path, key: str = "") -> None:
        """`log`: the file for what it writes to its standard error. `key`: what clients must send, "" for none."""
        self._command = [sys.executable, "-m", "bitdance", "serve", "--model", model, "--device", "cpu"]
        self._command += ["--queue", str(queue), "--batch-size", str(batch_size), "--port"]
        self._environment, self._port = ENVIRONMENT | {"BITDANCE_API_KEY": key}, "0"
        self.log, self.starts = log, 0
        self.away: list[list[float]] = []  # from each SIGTERM until the next one was ready

    async def start(self) -> str:
        """Start, and wait until it is ready. The address."""
        command = [*self._command, self._port]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.PIPE, stderr=log, env=self._environment
            )
        assert self.process.stdout is not None
        found = re.search(rb"http://127\.0\.0\.1:(\d+)", await self.process.stdout.readline())
        if found is None:
            raise SystemExit(f"the server did not start:\n{self.log.read_text()}")
        self._port, self.starts = found[1].decode(), self.starts + 1
        if self.away:
            self.away[-1][1] = time.monotonic()
        return found[0].decode()

    async def stop(self) -> int:
        """SIGTERM, and wait. The exit code."""
        self.away.append([time.monotonic(), float("inf")])
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    async def kill(self) -> None:
        """End it at once, if it is not."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def was_away(self, moment: float) -> bool:
        """Whether it was being stopped, or not there, at that moment."""
        return any(begin <= moment <= end for begin, end in self.away)

    def weight(self) -> dict[str, float]:
        """Resident memory in MB, open descriptors, threads."""
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        rss = round(int(status["VmRSS"].split()[0]) / 1024, 1)
        return {"rss_mb": rss, "files": len(os.listdir(folder / "fd")), "threads": int(status["Threads"])}
