"""What a run reports: metrics.jsonl always, TensorBoard beside it, Weights & Biases where asked for, pictures as files."""

import errno
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from bitdance.picture import write_png
from lfq_tokenizer.files import whole_file
from stages.engine.run_folder import naming_full

_ITSELF = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")  # no link, and no waiting for whoever reads a pipe


class Tracker:
    """Writes into the run's folder; a process other than the first gets `enabled=False` and writes nothing.

    `start` is the step that the run goes on from: what an earlier process reported of later ones is dropped, so that every step
    is there once. `wandb` is the project to report to, or empty; its own environment variables (WANDB_MODE=offline, …) hold.
    ValueError when it is asked for and not installed; `DiskFull` (a ValueError) names what could not be written.
    """

    def __init__(
        self, run: Path, enabled: bool = True, wandb: str = "", config: dict[str, Any] | None = None, start: int = 0
    ) -> None:
        self.run, self.enabled = run, enabled
        self._writer: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        self.metrics = run / "metrics.jsonl"
        _keep_until(self.metrics, start)
        if wandb:
            try:
                import wandb as package
            except ImportError:
                raise ValueError(f"run.wandb = {wandb!r}, but wandb is missing: pip install wandb, or leave it empty") from None
            self._wandb = package.init(project=wandb, name=run.name, dir=str(run), config=config, resume="allow")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: metrics go to metrics.jsonl only", file=sys.stderr)
        else:
            with naming_full(run / "tensorboard"):
                self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            with suppress(Exception):  # the error that ended the run is the one to tell
                self.finish()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point per value elsewhere."""
        if not self.enabled:
            return
        line = json.dumps({"step": step, **{k: _shown(v) for k, v in values.items()}}, allow_nan=False) + "\n"
        with naming_full(self.metrics):
            _append(self.metrics, line)
        if self._writer is not None:
            with naming_full(self.run / "tensorboard"):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """`samples/NAME_STEP.png` and an image elsewhere."""
        if not self.enabled:
            return
        folder = self.run / "samples"
        path = folder / f"{name}_{step:08d}.png"
        with naming_full(path):
            folder.mkdir(exist_ok=True)
            write_png(picture, path)
        if self._writer is not None:
            with naming_full(self.run / "tensorboard"):
                self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def finish(self) -> None:
        if self._writer is not None:
            with naming_full(self.run / "tensorboard"):
                self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, and what a killed process left of a line; the file is the old one or the new one."""
    try:
        with open(_opened(path, os.O_RDONLY), "rb") as file:
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if kept != lines:
        with whole_file(path) as whole:
            whole.writelines(kept)


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _append(path: Path, line: str) -> None:
    """One write at the end, so that rows never mix."""
    with open(_opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as file:
        data = line.encode("utf-8")
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _opened(path: Path, flags: int) -> int:
    """Of the file itself: a link that somebody put there is not written through."""
    try:
        return os.open(path, flags | sum(getattr(os, name, 0) for name in _ITSELF), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link; nothing is written through it: remove it, or choose another run.out") from None
        raise


def _shown(value: float) -> float | None:
    """Six digits; JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
