"""SIGINT and SIGTERM as an exception that never tears a file: it waits while a picture is being written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the program to end. `.code` is the exit code, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopSignals:
    """Within `with StopSignals() as stop:` a signal raises `Stopped`; within `with stop.held():` it waits for the end.

    A second signal does what it did before (SIGINT: KeyboardInterrupt). Outside the main thread, which alone may set
    signal handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._holding = False
        self._pending: int | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # A signal that the parent told us to ignore (a background job of a shell script) stays ignored.
            wanted = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending is not None:
            raise Stopped(self._pending)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._restore()
        self._pending = number
        if not self._holding:
            raise Stopped(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
