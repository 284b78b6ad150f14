"""A run: its spec, checked; and jobs → files, batch by batch, one being written while the next is made."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance import __version__
from bitdance.jobs.job import Job, batches, job_hash
from bitdance.jobs.outputs import OutputFolder
from bitdance.picture import to_uint8

if TYPE_CHECKING:
    from bitdance.folder.adapters import Adapter

Save = Callable[[Job, Image.Image, float], None]
Fail = Callable[[Job], None]
Pixels = Callable[[], tuple[np.ndarray, np.ndarray]]


class DecodeStream:
    """Bits → pixels. On CUDA the work is only queued, on a stream of its own, so that the next batch can start.

    Elsewhere it is done at once: on a CPU a second team of threads on the same cores would only slow both down.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        beside = pipe.device.type == "cuda" and pipe.offload is None  # with offload the decoder takes the LLM's room
        self.stream = torch.cuda.Stream(pipe.device) if beside else None

    def decode(self, bits_BChw: Tensor, generators: Sequence[torch.Generator]) -> Pixels:
        """→ a function, for any thread, that waits for the pixels, (B,H,W,3) uint8, and whether each is finite, (B)."""
        if self.stream is None:
            images_B3HW = self.pipe.decode_unchecked(bits_BChw, generators)
            found = to_uint8(images_B3HW).cpu().numpy(), _finite(images_B3HW).cpu().numpy()
            return lambda: found
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))  # the bits are being computed there
        with torch.cuda.stream(self.stream):
            images_B3HW = self.pipe.decode_unchecked(bits_BChw, generators)
            copies = [_copied(on_device) for on_device in (to_uint8(images_B3HW), _finite(images_B3HW))]
            done = torch.cuda.Event()
            done.record(self.stream)
        bits_BChw.record_stream(self.stream)  # its memory is not given away while this stream reads it

        def wait() -> tuple[np.ndarray, np.ndarray]:
            done.synchronize()
            pixels_BHW3, finite_B = copies
            return pixels_BHW3.numpy(), finite_B.numpy()

        return wait


def _finite(images_B3HW: Tensor) -> Tensor:
    return torch.isfinite(images_B3HW).flatten(1).all(1)


def _copied(on_device: Tensor) -> Tensor:
    copy = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
    return copy.copy_(on_device, non_blocking=True)


class BatchWriter:
    """Saves batches in a thread of its own, in the order given, but for pictures that are no finite numbers, which go to `fail`.
    Besides the batch being saved at most one waits.

    What goes wrong in the thread is raised by the next `check`, `give` or `close`; from then on nothing is saved.
    """

    def __init__(self, save: Save, fail: Fail) -> None:
        self._save, self._fail = save, fail
        self._waiting: Queue[tuple[Sequence[Job], Pixels, float] | None] = Queue(maxsize=1)
        self._error: BaseException | None = None
        # A daemon: whoever leaves in a hurry (a second Ctrl-C) does not wait. A file cut short then has a hidden name.
        self._thread = Thread(target=self._work, name="bitdance-writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything did."""
        if self._error is not None:
            raise self._error

    def give(self, batch: Sequence[Job], pixels: Pixels, seconds: float) -> None:
        """Save these pictures soon; waits while another batch waits. `seconds`: what each picture took so far."""
        self.check()
        self._waiting.put((batch, pixels, seconds))

    def close(self) -> None:
        """Wait until everything given is saved."""
        self._waiting.put(None)
        self._thread.join()
        self.check()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is None:  # afterwards the queue is only emptied, so that nobody waits for ever
                try:
                    batch, pixels, seconds = item
                    for job, pixels_HW3, finite in zip(batch, *pixels(), strict=True):
                        if finite:
                            self._save(job, Image.fromarray(pixels_HW3), seconds)
                        else:
                            self._fail(job)
                except BaseException as error:
                    self._error = error


@dataclass(frozen=True)
class RunSpec:
    """All that `generate` was asked for, checked: the jobs of this shard, and what to make them with."""

    jobs: Collection[Job]  # of this shard
    rules: Any  # what the model's kind knows
    settings: Any  # how it samples, but for steps and guidance, which are those of the job
    model: str  # as the user named it
    folder: Path
    fingerprint: str
    device: str
    dtype: str
    batch_size: int
    shard: tuple[int, int]
    output: Path
    grid: bool
    compile: bool | None
    sizes: frozenset[tuple[int, int, bool]]  # (height, width, guided) of all jobs
    quantize: str | None = None
    quantize_head: str | None = None
    offload: bool = False
    npz: bool = False
    quiet: bool = False
    verbose: bool = False
    adapter: "Adapter | None" = None

    @property
    def quantized(self) -> dict[str, str]:
        """What was asked for under `quantize` and `quantize_head`; {} without, as pictures ever said."""
        kinds = {"quantize": self.quantize, "quantize_head": self.quantize_head}
        return {name: kind for name, kind in kinds.items() if kind}

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `load_model` that change the weights."""
        lora = {} if self.adapter is None else {"lora": self.adapter.folder, "lora_scale": self.adapter.strength}
        return {"quantize": self.quantize, "quantize_head": self.quantize_head, **lora}

    def hash(self, job: Job) -> str:
        """What a finished picture of this job carries, so that another run knows it."""
        words = self.settings.words | self.quantized | self._adapter_words
        words.pop("lora", None)  # its name changes no picture
        return job_hash(job, self.fingerprint, self.dtype, words)

    def metadata(self, job: Job) -> dict[str, Any]:
        """What the PNG of a job says. No absolute path and no time: the same job gives the same file."""
        return {
            **job.metadata,
            **self.settings.words,
            "model": "demo" if self.model == "demo" else self.folder.resolve().name,
            "model_fingerprint": self.fingerprint,
            "dtype": self.dtype,
            **self.quantized,
            **self._adapter_words,
            "version": __version__,
            "job_hash": self.hash(job),
        }

    @property
    def _adapter_words(self) -> dict[str, Any]:
        return {} if self.adapter is None else self.adapter.words


class BatchRunner:
    """Jobs → files in the output folder, batch by batch. `made` and `failures` hold whatever ends `make`."""

    def __init__(
        self, spec: RunSpec, output: OutputFolder, on_saved: Callable[[Path, float], None] = lambda path, seconds: None
    ) -> None:
        """`on_saved` is told each file and the seconds that it took."""
        self.spec, self.output, self._on_saved = spec, output, on_saved
        self.made = 0
        self.failures: list[tuple[Job, str]] = []

    def make(
        self,
        pipe: Any,
        jobs: Sequence[Job],
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
        show: Callable[[float], None] = lambda done: None,
    ) -> None:
        """While a batch is in the loop, the one before is written. Every job ends as a file or in `failures`.

        A batch that fails is halved until the broken job stands alone. In `with held():` a signal has to wait.
        `show` gets the count of finished pictures, those of the batch at work by their share. OSError: writing failed.
        """
        decoding = DecodeStream(pipe)
        writer = BatchWriter(self._save, lambda job: self.failures.append((job, pipe.not_finite())))
        queue = deque(batches(jobs, self.spec.batch_size, _length(pipe)))

        def on_block(blocks: int, of: int, _: Tensor) -> None:
            writer.check()
            show(done + blocks / of * len(batch))

        done, batch = self.made + len(self.failures), list[Job]()
        try:
            while queue:
                batch, start = queue.popleft(), time.perf_counter()
                try:
                    pixels = self._run(pipe, decoding, batch, on_block)
                except Exception as error:  # whatever is wrong with one picture must not cost the others
                    writer.check()
                    if len(batch) == 1:
                        self.failures.append((batch[0], f"{type(error).__name__}: {error}"))
                        done += 1
                    else:
                        queue = _halved(batch, queue, error)
                    continue
                with held():
                    writer.give(batch, pixels, (time.perf_counter() - start) / len(batch))
                done += len(batch)
        finally:
            with held():
                writer.close()
        show(done)

    def _run(
        self, pipe: Any, decoding: DecodeStream, batch: Sequence[Job], on_block: Callable[[int, int, Tensor], None]
    ) -> Pixels:
        first = batch[0]
        generators = [torch.Generator().manual_seed(job.seed) for job in batch]
        settings = self.spec.settings.changed(steps=first.steps, guidance=first.guidance)
        conditions = [job.condition for job in batch]
        bits_BChw = pipe.generate(conditions, first.height, first.width, settings, generators, on_block)
        return decoding.decode(bits_BChw, generators)

    def _save(self, job: Job, picture: Image.Image, seconds: float) -> None:
        self.output.save(job, picture, self.spec.metadata(job), seconds)
        self.made += 1
        self._on_saved(self.output.folder / job.file, seconds)


def _length(pipe: Any) -> Callable[[Job], int]:
    """The prompt's tokens, as many as the loop will see."""

    @cache
    def count(prompt: str) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prompt that is cut is reported when its picture is made
            return int(pipe.prompt_length(prompt))

    return lambda job: count(job.prompt) if job.label is None else 0


def _halved(batch: list[Job], queue: Iterable[list[Job]], error: Exception) -> deque[list[Job]]:
    """The halves of a batch that failed, ahead of the others; these are halved too if the memory was too small."""
    half, waiting = len(batch) // 2, list(queue)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        warnings.warn(f"{len(batch)} pictures at once do not fit into memory; going on with {half}", stacklevel=2)
        waiting = [group[i : i + half] for group in waiting for i in range(0, len(group), half)]
    return deque([batch[:half], batch[half:], *waiting])
