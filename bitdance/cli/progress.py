"""How far a long command is: a bar on a terminal, a line now and then in a file."""

import sys
import time

from tqdm import tqdm

from lfq_tokenizer.text import time_text

EVERY = 30.0  # seconds between two lines where no terminal is
FORMAT = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} pictures [{elapsed}<{remaining}]"


class Progress:
    """`with Progress(total) as progress:` counts pictures, the one being made by its finished share, and tells the time left.

    `before` is the number of pictures that were there already. With `quiet` nothing is shown.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.before = total, 0
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=quiet or self._lines, bar_format=FORMAT)
        self._done = 0.0
        self._start = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self, count: int) -> None:
        """Leave out pictures that need not be made."""
        self.before += count
        self._bar.total = self._bar.total and max(self.total - self.before, 1)

    def show(self, done: float) -> None:
        """Show how many pictures are made; the one at work counts by its finished share."""
        self._done = max(self._done, done)
        self._bar.update(self._done - self._bar.n)
        now = time.monotonic()
        if self._lines and now - self._said >= EVERY and self._done:
            self._said = now
            all_of_them = self.total - self.before
            left = (now - self._start) * (all_of_them / self._done - 1)
            line = f"bitdance: {self._done:.1f} of {all_of_them} pictures, about {time_text(left)} left"
            print(line, file=sys.stderr, flush=True)
