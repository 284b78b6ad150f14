"""The loop of `bitdance generate`: load once, make batch after batch, keep what is finished whatever happens."""

import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from bitdance.cli import report
from bitdance.cli.generate import Order
from bitdance.cli.memory import GB, free_main_memory
from bitdance.cli.model_files import parts
from bitdance.cli.outputs import OutputFolder
from bitdance.cli.stop import Stopped, StopSignals
from bitdance.jobs import Job, batches
from bitdance.picture import grid, write_png

if TYPE_CHECKING:
    from bitdance.pipeline import BitDancePipeline

GRID_LIMIT = 256  # pictures on one sheet


def make(order: Order) -> int:
    """Make what is missing. 0 all done, 1 some failed (failures.jsonl), 128 + signal when stopped."""
    output = OutputFolder(order.output, order.model, order.shard)
    done = [job for job in order.jobs if output.is_done(job, order.hashes[job.index])]
    skip = {job.index for job in done}
    todo = [job for job in order.jobs if job.index not in skip]
    failures: list[tuple[Job, str]] = []
    made = 0
    with StopSignals() as stop, warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            output.check_writable()
            for job in done:
                output.ensure_listed(job)
            if todo:
                pipe = _load(order)
                output.folder.mkdir(parents=True, exist_ok=True)
                with tqdm(total=len(todo), unit="picture", disable=not sys.stderr.isatty()) as bar:
                    for job, picture, seconds, error in _pictures(pipe, todo, order.batch_size, bar):
                        if picture is None:
                            failures.append((job, error))
                        else:
                            with stop.held():
                                output.save(job, picture, order.metadata(job), seconds)
                                made += 1
                        bar.update()
            output.write_failures(failures)
            grid_path = _write_grid(order.jobs, {job.index for job, _ in failures}, output) if order.grid else None
        except Stopped as stopped:
            if failures:
                output.write_failures(failures)
            report(f"{stopped} after {made} of {len(todo)} pictures; the same command goes on from there", "stopped")
            return stopped.code
        except OSError as error:
            report(
                f"{error.strerror or error} ({error.filename or order.output}); {made} pictures are kept, "
                "the same command goes on from there"
            )
            return 1
    count = len(order.jobs) - len(failures)
    print(f"{count} picture{'' if count == 1 else 's'} in {order.output} ({made} made, {len(done)} there before)")
    if grid_path is not None:
        print(f"grid: {grid_path}")
    if failures:
        report(
            f"{len(failures)} of {len(order.jobs)} pictures failed: {failures[0][1]}; "
            f"all are listed in {output.failures}"
        )
        return 1
    return 0


def _load(order: Order) -> "BitDancePipeline":
    import torch

    from bitdance.checkpoint import load_model
    from bitdance.pipeline import BitDancePipeline

    dtype: torch.dtype = getattr(torch, order.dtype)
    _check_memory(order, dtype.itemsize)
    pipe = BitDancePipeline(load_model(order.folder, order.device, dtype, with_encoder=False))
    pipe.set_progress_bar_config(disable=True)  # one bar, over pictures
    return pipe


def _check_memory(order: Order, itemsize: int) -> None:
    """ValueError before gigabytes are read that cannot fit: the weights alone need more than is free."""
    import torch

    needed = itemsize * sum(part.parameters for part in parts(order.folder))
    is_cuda = order.device.startswith("cuda")
    free = torch.cuda.mem_get_info(torch.device(order.device))[0] if is_cuda else free_main_memory()
    if free is not None and needed > free:
        advice = "add --dtype bfloat16, or use" if itemsize > 2 else "use"
        raise ValueError(
            f"the weights of {order.model} need {needed / GB:.1f} GB in {order.dtype}, and {free / GB:.1f} GB are free "
            f"on {order.device}; {advice} a machine with more memory (bitdance doctor shows what fits)"
        )


def _pictures(pipe: "BitDancePipeline", jobs: list[Job], batch_size: int, bar: Any) -> Any:
    """Yield (job, picture or None, seconds, error). A batch that fails is halved until the broken job stands alone."""
    import torch

    def show(_: Any, step: int, share: float, values: dict[str, Any]) -> None:
        bar.set_postfix_str(f"batch {share:.0%}")

    queue = deque(batches(jobs, batch_size))
    while queue:
        batch = queue.popleft()
        first = batch[0]
        start = time.perf_counter()
        try:
            pictures: Any = pipe(
                [job.prompt for job in batch],
                height=first.height,
                width=first.width,
                num_inference_steps=first.steps,
                guidance_scale=first.guidance,
                seed=[job.seed for job in batch],
                callback_on_step_end=show,
            ).images
        except Exception as error:  # whatever is wrong with one picture must not cost the others
            if len(batch) == 1:
                yield first, None, 0.0, f"{type(error).__name__}: {error}"
                continue
            half = len(batch) // 2
            waiting = list(queue)
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                report(f"{len(batch)} pictures at once do not fit into memory; going on with {half}", "warning")
                waiting = [group[i : i + half] for group in waiting for i in range(0, len(group), half)]
            queue = deque([batch[:half], batch[half:], *waiting])
            continue
        seconds = (time.perf_counter() - start) / len(batch)
        for job, picture in zip(batch, pictures, strict=True):
            yield job, picture, seconds, ""


def _write_grid(jobs: list[Job], failed: set[int], output: OutputFolder) -> Path | None:
    """All pictures that exist on one sheet, also those of runs before; None when there is none."""
    present = [job for job in jobs if job.index not in failed]
    if not present:
        return None
    if len(present) > GRID_LIMIT:
        report(f"the grid shows the first {GRID_LIMIT} of {len(present)} pictures", "warning")
    write_png(grid([_opened(output.folder / job.file) for job in present[:GRID_LIMIT]]), output.grid)
    return output.grid


def _opened(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as picture:
        return picture.convert("RGB")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    report(str(message), "warning")
