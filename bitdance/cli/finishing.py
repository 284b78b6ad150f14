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
Pixels = Callable[[], np.ndarray]


class Decoder:
    """Bits → pixels. On CUDA the work is only queued, on a stream of its own, so that the next batch can start.

    Elsewhere it is done at once: on a CPU a second team of threads on the same cores would only slow both down.
    """

    def __init__(self, pipe: "BitDancePipeline") -> None:
        self.pipe = pipe
        beside = pipe.device.type == "cuda" and pipe.offload is None  # with offload the decoder takes the LLM's room
        self.stream = torch.cuda.Stream(pipe.device) if beside else None

    def decode(self, bits_BChw: Tensor, generators: Sequence[torch.Generator]) -> Pixels:
        """→ a function, for any thread, that waits for the pixels: (B,H,W,3) uint8."""
        if self.stream is None:
            pixels_BHW3 = to_uint8(self.pipe.decode(bits_BChw, generators)).cpu().numpy()
            return lambda: pixels_BHW3
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))  # the bits are being computed there
        with torch.cuda.stream(self.stream):
            on_device_BHW3 = to_uint8(self.pipe.decode(bits_BChw, generators))
            copy_BHW3 = torch.empty(on_device_BHW3.shape, dtype=torch.uint8, pin_memory=True)
            copy_BHW3.copy_(on_device_BHW3, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        bits_BChw.record_stream(self.stream)  # its memory is not given away while this stream reads it

        def wait() -> np.ndarray:
            done.synchronize()
            return copy_BHW3.numpy()

        return wait


class Finisher:
    """Saves batches in a thread of its own, in the order given. Besides the one being saved at most one waits.

    What goes wrong in the thread is raised by the next `check`, `give` or `close`; from then on nothing is saved.
    """

    def __init__(self, save: Save) -> None:
        self._save = save
        self._waiting: Queue[tuple[Sequence[Job], Pixels, float] | None] = Queue(maxsize=1)
        self._error: BaseException | None = None
        # A daemon: whoever leaves in a hurry (a second Ctrl-C) does not wait. A file cut short then is a `.tmp`.
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
                    for job, pixels_HW3 in zip(batch, pixels(), strict=True):
                        self._save(job, Image.fromarray(pixels_HW3), seconds)
                except BaseException as error:
                    self._error = error
