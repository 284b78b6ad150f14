"""The last part of a picture's way, beside the next batch: pixels → PNG and manifest in a thread of their own.

Letters: B pictures, H W pixels, C bits per token, h w token grid.
"""

from collections.abc import Callable, Sequence
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance.jobs import Job
from bitdance.picture import to_uint8

if TYPE_CHECKING:
    from bitdance.pipeline import BitDancePipeline

Save = Callable[[Job, Image.Image, float], None]
Fail = Callable[[Job], None]
Pixels = Callable[[], tuple[np.ndarray, np.ndarray]]


class Decoder:
    """Bits → pixels. On CUDA the work is only queued, on a stream of its own, so that the next batch can start.

    Elsewhere it is done at once: on a CPU a second team of threads on the same cores would only slow both down.
    """

    def __init__(self, pipe: "BitDancePipeline") -> None:
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


class Finisher:
    """Saves batches in a thread of its own, in the order given, but for pictures that are no finite numbers, which go to `fail`.
    Besides the batch being saved at most one waits.

    What goes wrong in the thread is raised by the next `check`, `give` or `close`; from then on nothing is saved.
    """

    def __init__(self, save: Save, fail: Fail) -> None:
        self._save, self._fail = save, fail
        self._waiting: Queue[tuple[Sequence[Job], Pixels, float] | None] = Queue(maxsize=1)
        self._error: BaseException | None = None
        # A daemon: whoever leaves in a hurry (a second Ctrl-C) does not wait. A file cut short then has a hidden name.
        self._thread = Thread(target=self._work, name="bitdance-finisher", daemon=True)
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
