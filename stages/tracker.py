"""What a run reports: metrics.jsonl always, TensorBoard beside it, Weights & Biases where asked for, pictures as files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Tracker:
    """Writes into the run's folder; a process other than the first gets `enabled=False` and writes nothing.

    `wandb` is the project to report to, or empty; its own environment variables (WANDB_MODE=offline, …) hold. ValueError when it
    is asked for and not installed.
    """

    def __init__(self, run: Path, enabled: bool = True, wandb: str = "", config: dict[str, Any] | None = None) -> None:
        self.run, self.enabled = run, enabled
        self._writer: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        if wandb:
            try:
                import wandb as package
            except ImportError:
                raise ValueError(f"run.wandb = {wandb!r}, but wandb is missing: pip install wandb, or leave it empty") from None
            self._wandb = package.init(project=wandb, name=run.name, dir=str(run), config=config, resume="allow")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: metrics go to metrics.jsonl only")
        else:
            self._writer = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point per value elsewhere."""
        if not self.enabled:
            return
        with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: _shown(v) for k, v in values.items()}}, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """`samples/NAME_STEP.png` and an image elsewhere."""
        if not self.enabled:
            return
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}_{step:08d}.png"
        picture.save(path)
        if self._writer is not None:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _shown(value: float) -> float | None:
    """Six digits; JSON has no NaN and no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
