"""What a run says while it trains: a bar where a terminal is, else a line now and then. On standard error, by process 0 alone."""

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from lfq_tokenizer.text import time_text
from stages.config import TrainingConfig

# what is done with a finished run, by recipe
NEXT = {
    "tokenizer": "bitdance tokenizer eval PICTURES --model {run}, bitdance export {run} OUT",
    "generator": "bitdance export {run} MODEL, bitdance generate PROMPT --model MODEL",
    "class_patch": "bitdance export {run} MODEL, bitdance generate --class all --model MODEL",
    "next_scale": "bitdance export {run} MODEL, bitdance generate PROMPT --model MODEL (or --class all)",
    "refine": "bitdance export {run} MODEL, bitdance generate PROMPT --model MODEL (or --class all)",
    "distill": "bitdance export {run} MODEL, bitdance generate PROMPT --model MODEL",
    "few_steps": "bitdance export {run} MODEL, bitdance generate PROMPT --model MODEL",
    "few_steps_class": "bitdance export {run} MODEL, bitdance generate --class all --model MODEL",
}
ADAPTER_NEXT = "bitdance export {run} ADAPTER --adapter, bitdance generate PROMPT --lora ADAPTER"


class Progress:
    """Of the steps `start` to `config.run.steps`. What cannot be said (the terminal is gone, the disk of a log is full) does not
    end a run."""

    def __init__(self, config: TrainingConfig, start: int, first: bool) -> None:
        self.run, self.recipe, self.start, self.first = config.run, config.recipe, start, first
        self._lora = config.generator.lora is not None
        terminal = first and sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=self.run.steps, initial=start, disable=not terminal, unit="step")
        self._begun: tuple[int, float] | None = None  # after the first step, which is slower than the others
        self._told = False

    def opening(self, parameters: int, trained: int, device: str, precision: str, world: int) -> None:
        run, numbers = self.run, f"{parameters:,} parameters"
        if trained != parameters:
            numbers += f" ({trained:,} train)"
        if self.start >= run.steps:
            self.say(f"{run.out} has its {run.steps:,} steps already; nothing is trained (run.steps says how many)")
            return
        many = f", {world} processes" if world > 1 else ""
        samples = run.batch_size * run.accumulation * world
        steps = f"steps {self.start + 1:,} to {run.steps:,} of {samples:,} samples each"
        self.say(f"training a {self.recipe} in {run.out}: {steps}, {numbers}, {device}, {precision}{many}")

    def advance(self, done: int) -> None:
        """Step `done` has ended. After the third of a start, how long the rest will take."""
        with suppress(OSError):
            self.bar.update()
        if self._begun is None:
            self._begun = done, time.monotonic()
        elif done == self.start + 3 and not self._told and not self.shows_bar:
            self.say(f"about {self._left(done)} for the {self.run.steps - done:,} steps to come")

    def row(self, done: int, values: Mapping[str, float]) -> None:
        """A logged step: loss, speed and the time that is left."""
        if self.shows_bar:
            with suppress(OSError):
                self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            return
        self._told = True
        left = f", {self._left(done)} left" if done < self.run.steps and self._left(done) else ""
        self.say(f"step {done:,}/{self.run.steps:,}: loss {values['loss']:.4f}, {values['images_per_s']:.3g} pictures/s{left}")

    def ending(self, saved: Path | None, stopped: int) -> None:
        if stopped:
            name = signal.Signals(stopped).name
            self.say(f"stopped by {name}: saved {saved}; go on with the same command (--resume auto)")
        elif saved is not None:
            following = ADAPTER_NEXT if self._lora else NEXT[self.recipe]
            self.say(f"saved {saved}; go on with: {following.format(run=self.run.out)}")

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()

    @property
    def shows_bar(self) -> bool:
        return not self.bar.disable

    def say(self, text: str) -> None:
        if self.first and sys.stderr is not None:
            with suppress(OSError, ValueError):
                if self.shows_bar:
                    self.bar.clear()
                print(text, file=sys.stderr, flush=True)

    def _left(self, done: int) -> str:
        if self._begun is None or done <= self._begun[0]:
            return ""
        pace = (time.monotonic() - self._begun[1]) / (done - self._begun[0])
        return time_text(pace * (self.run.steps - done))
