"""What Prometheus is told: requests by route and status, pictures by outcome, the queue, batches."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """The figures of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter("bitdance_requests", "Answers, by route and status.", ("route", "status"), registry=to)
        self.seconds = Histogram("bitdance_request_seconds", "From request to answer.", ("route",), registry=to, buckets=SECONDS)
        self.pictures = Counter("bitdance_pictures", "Pictures, by outcome.", ("outcome",), registry=to)
        self.previews = Counter("bitdance_previews", "Previews that were decoded.", registry=to)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch = Histogram("bitdance_batch_pictures", "Pictures that were made together.", registry=to, buckets=sizes)
        self.batch_seconds = Histogram("bitdance_batch_seconds", "Time of a batch.", registry=to, buckets=SECONDS)
        self._waiting = Gauge("bitdance_waiting_requests", "Requests in the queue.", registry=to)
        self._running = Gauge("bitdance_running_pictures", "Pictures at work.", registry=to)

    def watch(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Ask these two for the present state of the queue."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)
