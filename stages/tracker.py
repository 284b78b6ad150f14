"""What a run reports: metrics.jsonl always, TensorBoard beside it, pictures as files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Tracker:
    """Writes into the run's folder; a process other than the first gets `enabled=False` and writes nothing."""

    def __init__(self, run: Path, enabled: bool = True) -> None:
        self.run, self.enabled = run, enabled
        self._writer: Any = None
        if enabled:
            run.mkdir(parents=True, exist_ok=True)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                print("tensorboard is not installed: metrics go to metrics.jsonl only")
            else:
                self._writer = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one TensorBoard point per value."""
        if not self.enabled:
            return
        with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: _shown(v) for k, v in values.items()}}, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """`samples/NAME_STEP.png` and a TensorBoard image."""
        if not self.enabled:
            return
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{name}_{step:08d}.png")
        if self._writer is not None:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _shown(value: float) -> float | None:
    """Six digits; JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
