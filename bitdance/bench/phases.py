"""Where the time of a real run goes: marks at the model's parts, set from outside, on the run that users get."""

import time
from collections.abc import Callable
from typing import Any

import torch

from bitdance.costs.peak import wait
from bitdance.model import BitDanceModel

PHASES = ("prefill", "llm", "head", "projector", "decode", "png", "other")


class PhaseClock:
    """A context around one run of `model`. What lies between a backbone call and the next projector call is the head's: its
    evaluations and the sampler's own arithmetic. Backbone calls ahead of the first of these are prefill.

    On CUDA the marks are events in the stream, so that nothing waits for them.
    """

    def __init__(self, model: BitDanceModel) -> None:
        self.device = model.backbone.device
        self._model = model
        self._hooks: list[Any] = []
        self._marks: list[tuple[str, float, float, Any]] = []
        self._sampling = False

    def __enter__(self) -> "PhaseClock":
        backbone, projector = self._model.backbone, self._model.projector
        self._hooks = [
            backbone.register_forward_pre_hook(self._marks_end_of(lambda: "other")),
            backbone.register_forward_hook(self._marks_end_of(lambda: "llm" if self._sampling else "prefill")),
            projector.register_forward_pre_hook(self._marks_end_of(lambda: "head")),
            projector.register_forward_hook(self._marks_end_of(lambda: "projector")),
        ]
        wait(self.device)
        self.mark("")
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        wait(self.device)

    def mark(self, phase: str) -> None:
        """What lies between the last mark and this one belongs to `phase`."""
        self._sampling |= phase == "head"
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        self._marks.append((phase, time.perf_counter(), time.process_time(), event))

    def _marks_end_of(self, phase: Callable[[], str]) -> Callable[..., None]:
        return lambda *_: self.mark(phase())

    def spent(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by phase, of the clock on the wall and of this process's CPU time."""
        wall, cpu = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        for (_, wall_0, cpu_0, event_0), (phase, wall_1, cpu_1, event_1) in zip(self._marks, self._marks[1:]):
            wall[phase] += wall_1 - wall_0 if event_1 is None else event_0.elapsed_time(event_1) / 1000
            cpu[phase] += cpu_1 - cpu_0
        return wall, cpu
