"""What `bitdance generate` does once all is checked: load once, make batch after batch, keep whatever is finished."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bitdance.cli import print_page, report
from bitdance.cli.finishing import Decoder, Finisher, Pixels
from bitdance.cli.generate import Order
from bitdance.cli.loading import load
from bitdance.cli.outputs import OutputFolder
from bitdance.cli.progress import Progress
from bitdance.cli.stop import Stopped, StopSignals
from bitdance.jobs import Job, batches
from bitdance.picture import grid, write_png
from bitdance.prompt import conditional_ids
from lfq_tokenizer.files import DiskFull

if TYPE_CHECKING:
    from bitdance.pipeline import BitDancePipeline

GRID_LIMIT = 256  # pictures on one sheet
WINDOW = 4096  # jobs that are sorted into batches together
Failures = Sequence[tuple[Job, str]]  # with the reason


def make(order: Order) -> int:
    """Make what is missing. 0 all done, 1 some failed (failures.jsonl), 128 + signal when stopped."""
    output = OutputFolder(order.output, order.model, order.shard)
    output.check_writable()
    maker = Maker(order, output)
    with StopSignals() as stop:
        try:
            with output.held(), Progress(len(order.jobs), order.quiet) as progress:
                pipe: BitDancePipeline | None = None
                for jobs in _windows(order.jobs):
                    todo = output.missing(jobs, order.hash)
                    progress.skip(len(jobs) - len(todo))
                    if todo:
                        pipe = pipe or load(order)
                        maker.make(pipe, todo, stop.held, progress.show)
                output.write_failures(maker.failures)
                grid_path = write_grid(order.jobs, maker.failures, output) if order.grid else None
        except Stopped as stopped:
            if maker.failures:
                output.write_failures(maker.failures)
            report(f"{stopped} after {maker.made} of {len(order.jobs)} pictures; the same command goes on from there", "stopped")
            return stopped.code
        except DiskFull as error:
            report(f"{error}; {maker.made} pictures are kept, the same command goes on from there")
            return 1
        except OSError as error:
            report(
                f"{error.strerror or error} ({error.filename or order.output}); {maker.made} pictures are kept, "
                "the same command goes on from there"
            )
            return 1
    return conclude(order, output, maker.made, maker.failures, progress.before, grid_path)


def _windows(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs by the thousand: inside a window they are sorted into batches, and no more than one of them is held."""
    iterator = iter(jobs)
    while window := list(islice(iterator, WINDOW)):
        yield window


def conclude(order: Order, output: OutputFolder, made: int, failures: Failures, before: int, grid_path: Path | None) -> int:
    """Say what is there now; the exit code. `before`: pictures that were there already."""
    count = len(order.jobs) - len(failures)
    if not order.quiet:
        lines = [f"{count} picture{'' if count == 1 else 's'} in {order.output} ({made} made, {before} there before)"]
        print_page([*lines, *([f"grid: {grid_path}"] if grid_path else [])])
    if failures:
        report(f"{len(failures)} of {len(order.jobs)} pictures failed: {failures[0][1]}; all are listed in {output.failures}")
        return 1
    return 0


class Maker:
    """Jobs → files in the output folder, batch by batch. `made` and `failures` hold whatever ends `make`."""

    def __init__(self, order: Order, output: OutputFolder) -> None:
        self.order, self.output = order, output
        self.made = 0
        self.failures: list[tuple[Job, str]] = []

    def make(
        self,
        pipe: "BitDancePipeline",
        jobs: Sequence[Job],
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
        show: Callable[[float], None] = lambda done: None,
    ) -> None:
        """While a batch is in the loop, the one before is written. Every job ends as a file or in `failures`.

        A batch that fails is halved until the broken job stands alone. In `with held():` a signal has to wait.
        `show` gets the count of finished pictures, those of the batch at work by their share. OSError: writing failed.
        """
        decoder = Decoder(pipe)
        finisher = Finisher(self._save, lambda job: self.failures.append((job, pipe.not_finite())))
        queue = deque(batches(jobs, self.order.batch_size, _length(pipe)))

        def on_block(_: Any, step: int, share: float, values: dict[str, Any]) -> None:
            finisher.check()
            show(done + share * len(batch))

        done, batch = self.made + len(self.failures), list[Job]()
        try:
            while queue:
                batch, start = queue.popleft(), time.perf_counter()
                try:
                    pixels = self._run(pipe, decoder, batch, on_block)
                except Exception as error:  # whatever is wrong with one picture must not cost the others
                    finisher.check()
                    if len(batch) == 1:
                        self.failures.append((batch[0], f"{type(error).__name__}: {error}"))
                        done += 1
                    else:
                        queue = _halved(batch, queue, error)
                    continue
                with held():
                    finisher.give(batch, pixels, (time.perf_counter() - start) / len(batch))
                done += len(batch)
        finally:
            with held():
                finisher.close()
        show(done)

    def _run(self, pipe: "BitDancePipeline", decoder: Decoder, batch: Sequence[Job], on_block: Any) -> Pixels:
        import torch

        first = batch[0]
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        bits_BChw = pipe(
            [job.condition for job in batch],  # type: ignore[misc]  # prompts, or classes of a class pipeline
            height=first.height,
            width=first.width,
            **self.order.sampling.changed(steps=first.steps, guidance=first.guidance).arguments(),
            generator=generators,
            output_type="bits",
            callback_on_step_end=on_block,
        ).bits
        return decoder.decode(bits_BChw, generators)

    def _save(self, job: Job, picture: Image.Image, seconds: float) -> None:
        self.output.save(job, picture, self.order.metadata(job), seconds)
        self.made += 1
        if self.order.verbose:
            print_page([f"{self.output.folder / job.file}: {seconds:.2f} s"])


def _length(pipe: "BitDancePipeline") -> Callable[[Job], int]:
    """The prompt's tokens, as many as the loop will see."""

    @cache
    def count(prompt: str) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prompt that is cut is reported when its picture is made
            return len(conditional_ids(pipe.model.text_tokenizer, prompt))

    return lambda job: count(job.prompt) if job.label is None else 0


def _halved(batch: list[Job], queue: Iterable[list[Job]], error: Exception) -> deque[list[Job]]:
    """The halves of a batch that failed, ahead of the others; these are halved too if the memory was too small."""
    import torch

    half, waiting = len(batch) // 2, list(queue)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        report(f"{len(batch)} pictures at once do not fit into memory; going on with {half}", "warning")
        waiting = [group[i : i + half] for group in waiting for i in range(0, len(group), half)]
    return deque([batch[:half], batch[half:], *waiting])


def write_grid(jobs: Iterable[Job], failures: Failures, output: OutputFolder) -> Path | None:
    """All pictures that exist on one sheet, also those of runs before; None when there is none."""
    failed = {job.index for job, _ in failures}
    present = list(islice((job for job in jobs if job.index not in failed), GRID_LIMIT + 1))
    if not present:
        return None
    if len(present) > GRID_LIMIT:
        report(f"the grid shows the first {GRID_LIMIT} pictures", "warning")
    write_png(grid([_opened(output.folder / job.file) for job in present[:GRID_LIMIT]]), output.grid)
    return output.grid


def _opened(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as picture:
        return picture.convert("RGB")
