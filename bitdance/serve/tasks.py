"""A request that was taken in: its pictures, what became of them, and who wants to know."""

import asyncio
import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from typing import Any, NamedTuple

from PIL import Image

from bitdance.jobs.job import Job
from bitdance.serve.errors import ApiError, timed_out
from bitdance.serve.model import Plan
from bitdance.serve.openai_images import ImageRequest


class Made(NamedTuple):
    """A finished picture: the bytes of its file, and the tokens of its prompt."""

    file: bytes
    text_tokens: int


class Event(NamedTuple):
    """What a listener is told: "preview" and "picture" with the number of the picture in its request and a file, "end"."""

    name: str
    picture: int = 0
    file: bytes = b""
    preview: int = 0


class Picture:
    """One picture of a task."""

    def __init__(self, task: "Task", index: int, job: Job) -> None:
        self.task, self.index, self.job = task, index, job
        self.made: Made | None = None
        self.progress = 0.0  # finished share
        self.previews = 0

    @property
    def key(self) -> Hashable:
        """Pictures of equal keys can share a batch."""
        return self.task.plan.key

    @property
    def over(self) -> bool:
        """Whether nobody wants it any more, because its task was ended or is late."""
        return self.task.over


class Task:
    """A request in the queue, at work or finished. Any thread may call it. `kept`: it goes on when its client leaves."""

    def __init__(self, number: str, plan: Plan, request: ImageRequest, seconds: float, edit: bool = False) -> None:
        """`seconds`: from now on, until it ends with 408."""
        self.id, self.plan, self.request, self.edit = number, plan, request, edit
        self.kept = request.job is not None
        self.pictures = [Picture(self, index, job) for index, job in enumerate(plan.jobs)]
        self.created, self.begun = int(time.time()), False
        self.error: ApiError | None = None
        self.ended: float | None = None
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self._lock = threading.Lock()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event]]] = []

    @property
    def over(self) -> bool:
        """Whether it ended without its pictures; a late one ends here."""
        if self.ended is None and time.monotonic() > self.deadline:
            self.fail(timed_out(self.seconds))
        return self.error is not None

    @property
    def status(self) -> str:
        """queued, running, done, cancelled or failed."""
        if self.error is not None:
            return "cancelled" if self.error.code == "cancelled" else "failed"
        return "done" if self.ended is not None else "running" if self.begun else "queued"

    @property
    def progress(self) -> float:
        """The finished share of its pictures, in [0, 1]."""
        return sum(1.0 if picture.made else picture.progress for picture in self.pictures) / len(self.pictures)

    @property
    def held_bytes(self) -> int:
        """What it holds: its finished pictures, and those that an edit was given."""
        given = sum(value.width * value.height * 3 for value in self.plan.edit.values() if isinstance(value, Image.Image))
        return given + sum(len(picture.made.file) for picture in self.pictures if picture.made)

    def listen(self) -> "asyncio.Queue[Event]":
        """The events from the first picture on, also of a task that is finished. Call it in an event loop."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        with self._lock:
            for picture in self.pictures:
                if picture.made is not None:
                    queue.put_nowait(Event("picture", picture.index, picture.made.file))
            if self.ended is not None:
                queue.put_nowait(Event("end"))
            else:
                self._listeners.append((asyncio.get_running_loop(), queue))
        return queue

    def leave(self, queue: "asyncio.Queue[Event]") -> bool:
        """No more events for this listener. Whether nobody listens now."""
        with self._lock:
            self._listeners = [one for one in self._listeners if one[1] is not queue]
            return not self._listeners

    def show(self, picture: Picture, file: bytes) -> None:
        """Tell the listeners a preview."""
        with self._lock:
            if self.ended is None:
                self._tell(Event("preview", picture.index, file, picture.previews))
                picture.previews += 1

    def finish(self, picture: Picture, made: Made) -> bool:
        """Keep a finished picture. False where the task has ended before."""
        with self._lock:
            if self.ended is not None:
                return False
            picture.made = made
            self._tell(Event("picture", picture.index, made.file))
            if all(one.made for one in self.pictures):
                self._end()
            return True

    def fail(self, error: ApiError) -> bool:
        """End the task. False where it has ended before."""
        with self._lock:
            if self.ended is not None:
                return False
            self.error = error
            self._end()
            return True

    def _end(self) -> None:
        self.ended = time.monotonic()
        self._tell(Event("end"))
        self._listeners = []

    def _tell(self, event: Event) -> None:
        for loop, queue in self._listeners:
            with suppress(RuntimeError):  # a loop that is closed
                loop.call_soon_threadsafe(queue.put_nowait, event)


def text_tokens(pipe: Any, job: Job) -> int:
    """Tokens of the prompt; 0 for a class."""
    return int(pipe.prompt_length(job.prompt)) if job.label is None else 0
