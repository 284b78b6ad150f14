"""The bounded queue: requests wait, a thread per device takes equal ones together; finished ones can be fetched."""

import math
import threading
import time
from collections import OrderedDict
from typing import Any

import torch

from bitdance.serve.errors import ApiError, cancelled, failed, queue_full, stopping
from bitdance.serve.metrics import Metrics
from bitdance.serve.model import ServedModel
from bitdance.serve.settings import Limits
from bitdance.serve.tasks import Picture, Task
from bitdance.serve.worker import LOG, Batch


class ImageQueue:
    """Takes tasks in, and has their pictures made. Any thread may call it; its own threads run between `start` and `join`."""

    def __init__(self, model: ServedModel, limits: Limits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self._waiting: list[Picture] = []
        self._running = 0
        self._tasks: OrderedDict[str, Task] = OrderedDict()
        self._condition = threading.Condition()
        self._stopping = False
        self._seconds: float | None = None  # of a batch, lately
        self._threads: list[threading.Thread] = []
        metrics.watch(lambda: self.waiting, lambda: self._running)

    def start(self) -> None:
        """Start a thread for each device."""
        for i, pipe in enumerate(self.model.pipes):
            thread = threading.Thread(target=self._work, args=(pipe,), name=f"bitdance-worker-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, at_once: bool = False) -> None:
        """Refuse what waits; what was begun is finished, or `at_once` refused as well."""
        with self._condition:
            self._stopping = True
            for task in self._tasks.values():
                if at_once or not task.begun:
                    task.fail(stopping())
            self._drop()
            self._condition.notify_all()

    def join(self) -> None:
        """Wait until the threads have finished what was begun."""
        for thread in self._threads:
            thread.join()

    @property
    def healthy(self) -> bool:
        """Whether requests are taken in, and every thread lives."""
        return not self._stopping and bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Requests of which no picture was begun."""
        return len({picture.task.id for picture in list(self._waiting) if not picture.task.begun})

    @property
    def running(self) -> int:
        """Pictures at work."""
        return self._running

    def submit(self, task: Task) -> Task:
        """Take a task in; a request with the id and the content of an earlier one gets that one. ApiError 503 while the server
        stops, 429 when the queue is full, 409 for another request under a known id."""
        with self._condition:
            self._purge()
            known = self._tasks.get(task.id)
            if known is not None and known.error is None:  # one that failed may be tried again
                if known.request != task.request or known.edit:
                    raise ApiError(409, "job: another request has this id; choose a fresh one", "job", "job_exists", False)
                return known
            if self._stopping:
                raise stopping()
            self._drop()
            if (waiting := self.waiting) >= self.limits.queue:
                raise queue_full(waiting, self.estimate(len(self._waiting)))
            self._tasks[task.id] = task
            self._waiting += task.pictures
            self._condition.notify()
        return task

    def find(self, number: str) -> Task:
        """The task of that id. ApiError 404 where there is none, or none any more."""
        with self._condition:
            self._purge()
            if (task := self._tasks.get(number)) is None:
                raise ApiError(404, "there is no such job, or it was finished too long ago", "job", "job_not_found")
            return task

    def end(self, task: Task) -> None:
        """Cancel a task: its pictures alone are not worked on any more, and their places are free. Forget one that is
        finished."""
        if not task.fail(cancelled()):
            with self._condition:
                self._tasks.pop(task.id, None)
            return
        self.metrics.pictures.labels("cancelled").inc(sum(picture.made is None for picture in task.pictures))
        with self._condition:
            self._drop()

    def position(self, task: Task) -> int | None:
        """How many pictures go first; None once it was begun."""
        with self._condition:
            places = [place for place, picture in enumerate(self._waiting) if picture.task is task]
        return None if task.begun or not places else places[0]

    def estimate(self, pictures: int) -> int:
        """Seconds until so many pictures are made, from 1 on; a guess from the batches before."""
        batches = math.ceil(max(pictures, 1) / self.limits.batch_size) / max(len(self._threads), 1)
        return max(1, min(120, math.ceil(batches * (self._seconds or 1.0))))

    def _drop(self) -> None:
        """Take out of the queue what nobody waits for."""
        self._waiting = [picture for picture in self._waiting if not picture.over]

    def _purge(self) -> None:
        """Forget finished tasks beyond the limits, the oldest first."""
        now, limits = time.monotonic(), self.limits
        ended = sorted((t for t in self._tasks.values() if t.ended is not None), key=lambda t: t.ended or 0.0)
        size = sum(task.held_bytes for task in ended)
        for place, task in enumerate(ended):
            late = now - (task.ended or now) > limits.kept_seconds
            if not (late or len(ended) - place > limits.kept_jobs or size > limits.kept_bytes):
                break
            size -= task.held_bytes
            del self._tasks[task.id]

    def _take(self, most: int) -> list[Picture] | None:
        """The oldest picture and those that can be made with it; None when there is no more to do."""
        with self._condition:
            while True:
                self._drop()
                if self._waiting:
                    break
                if self._stopping:
                    return None
                self._condition.wait()
            key = self._waiting[0].key
            batch = [picture for picture in self._waiting if picture.key == key][:most]
            taken = set(map(id, batch))
            self._waiting = [picture for picture in self._waiting if id(picture) not in taken]
            for picture in batch:
                picture.task.begun = True
            self._running += len(batch)
            return batch

    def _work(self, pipe: Any) -> None:
        most = self.limits.batch_size
        while (batch := self._take(most)) is not None:
            start = time.monotonic()
            try:
                most = self._make(pipe, batch, most)
            except Exception:  # the thread must live: the next request is another one
                LOG.exception("a batch failed")
                for picture in batch:
                    picture.task.fail(failed())
            finally:
                took = time.monotonic() - start
                self.metrics.batch.observe(len(batch))
                self.metrics.batch_seconds.observe(took)
                with self._condition:  # last, so that nothing runs means everything is counted
                    self._running -= len(batch)
                    self._seconds = took if self._seconds is None else 0.7 * self._seconds + 0.3 * took

    def _make(self, pipe: Any, batch: list[Picture], most: int) -> int:
        """Make a batch; one that fails is halved until the broken picture stands alone. → the most pictures that fit."""
        todo = [batch]
        while todo:
            part = [picture for picture in todo.pop(0) if picture.made is None and not picture.over]
            if not part:
                continue
            try:
                Batch(pipe, part, self.limits, self.metrics).make()
            except Exception as error:
                half = len(part) // 2
                if half:
                    if isinstance(error, torch.OutOfMemoryError | MemoryError):
                        LOG.warning("%d pictures at once do not fit into memory; going on with %d", len(part), half)
                        most = min(most, half)
                    todo = [part[:half], part[half:], *todo]
                    continue
                LOG.exception("a picture failed")
                part[0].task.fail(failed())
                self.metrics.pictures.labels("failed").inc()
        return most
