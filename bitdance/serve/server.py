"""A process that serves an app: one address, signals that finish what was begun, an exit code."""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CONNECTIONS = 1000  # at once; one more gets 503 before its request is read
GRACE = 10.0  # seconds to read an answer in, when the server stops and the time limit of every request is over
AT_ONCE = 1.0  # the same after a second signal


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything is loaded. OSError where it is taken or not of this machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


def address_of(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, whose first signal refuses what waits and finishes what was begun; the second one gives that up. `stopped_by` is
    the signal."""

    def __init__(self, app: FastAPI, ready: Callable[[], None] = lambda: None) -> None:
        """`ready` is called when requests are answered."""
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "ws": "none"}
        super().__init__(uvicorn.Config(app, **quiet, timeout_keep_alive=15, limit_concurrency=CONNECTIONS))
        self._queue, self._ready = app.state.queue, ready
        self.stopped_by: int | None = None
        self._at_once = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While it serves, the signals are its own; what the parent told us to ignore stays ignored."""
        loop = asyncio.get_running_loop()
        wanted = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        try:
            for number in wanted:
                loop.add_signal_handler(number, self.stop, number)
        except (RuntimeError, ValueError, NotImplementedError):  # not the main thread, which alone hears signals
            wanted = []
        try:
            yield
        finally:
            for number in wanted:
                loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the last answers be read, but wait for no client that does not read."""
        watch = asyncio.create_task(self._hang_up())
        try:
            await super().shutdown(sockets)
        finally:
            watch.cancel()

    async def _hang_up(self) -> None:
        end = time.monotonic() + self._queue.limits.seconds + GRACE
        while time.monotonic() < end and not self._at_once:
            await asyncio.sleep(0.1)
        await asyncio.sleep(AT_ONCE if self._at_once else 0)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, 0 where none came."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    @property
    def last_words(self) -> str:
        """What became of the requests."""
        return f"what was begun is {'given up' if self._at_once else 'finished'}, what waited was refused"

    def stop(self, number: int | None = None) -> None:
        """Refuse what waits, finish what was begun, end. Called again: refuse that, too."""
        self._at_once = self.should_exit
        self.stopped_by, self.should_exit = number, True
        self._queue.stop(self._at_once)


def serve(app: FastAPI, bound: socket.socket, ready: Callable[[], None] = lambda: None) -> Server:
    """Serve until a signal. The server, which says how it ended."""
    logging.getLogger("bitdance.serve").setLevel(logging.INFO)
    server = Server(app, ready)
    server.run(sockets=[bound])
    return server
