"""A batch of pictures: who left is left out, previews come at a bounded rate, each file as soon as it is ready."""

import io
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from bitdance.picture import save_png, to_pil
from bitdance.serve.errors import bad_request, failed
from bitdance.serve.metrics import Metrics
from bitdance.serve.openai_images import ImageRequest
from bitdance.serve.settings import Limits
from bitdance.serve.tasks import Made, Picture, text_tokens

LOG = logging.getLogger("bitdance.serve")


class Batch:
    """Pictures of one key, made together on one pipeline."""

    def __init__(self, pipe: Any, pictures: Sequence[Picture], limits: Limits, metrics: Metrics) -> None:
        self.pipe, self.pictures, self.limits, self.metrics = pipe, list(pictures), limits, metrics
        self._start, self._spent = time.monotonic(), 0.0  # seconds of previews
        self._begun = False

    def make(self) -> None:
        """Make and deliver all that are still wanted. Raises what the pipeline raises; then nothing was delivered, or some."""
        (self._edit if self.pictures[0].task.plan.edit else self._generate)()

    def _generate(self) -> None:
        plans, jobs = [p.task.plan for p in self.pictures], [p.job for p in self.pictures]
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        negative = [plan.negative for plan in plans]
        more = {} if negative[0] is None else {"negative": negative}
        conditions = [job.condition for job in jobs]
        first, settings = jobs[0], plans[0].spec.settings

        def on_block(done: int, total: int, tokens: Any) -> None:
            self._on_step(done / total, tokens)

        tokens = self.pipe.generate(conditions, first.height, first.width, settings, generators, on_block, **more)
        for i, picture in enumerate(self.pictures):
            if not picture.over:  # decoded one by one, as everywhere, so a picture does not depend on its neighbours
                pixels_13HW = self.pipe.decode_unchecked(tokens[i : i + 1], generators[i : i + 1])
                if bool(torch.isfinite(pixels_13HW).all()):
                    self._deliver(picture, to_pil(pixels_13HW)[0])
                else:
                    LOG.error("%s", self.pipe.not_finite())
                    picture.task.fail(failed())

    def _edit(self) -> None:
        edit = dict(self.pictures[0].task.plan.edit)
        seeds = [picture.job.seed for picture in self.pictures]

        def on_step(_: Any, step: int, t: float, state: dict[str, Any]) -> None:
            self._on_step(t, state["tokens"])

        try:
            out = self.pipe.edit(
                edit.pop("image"), **edit, num_images=len(seeds), seed=seeds, callback_on_step_end=on_step, output_type="pil"
            )
        except ValueError as error:
            if self._begun:
                raise
            self.pictures[0].task.fail(bad_request(error))  # the picture or the mask does not fit
            return
        for picture, image in zip(self.pictures, out.images, strict=True):
            self._deliver(picture, image)

    def _on_step(self, share: float, tokens: Any) -> None:
        self._begun = True
        for i, picture in enumerate(self.pictures):
            if picture.over:
                self.pipe.cancel(i)
                continue
            picture.progress = share
            wanted = picture.task.request.previews
            due = picture.previews < wanted and share < 1 and share * (wanted + 1) >= picture.previews + 1
            if due and self._spent <= self.limits.preview_share * (time.monotonic() - self._start):
                self._preview(picture, i, tokens)

    def _preview(self, picture: Picture, i: int, tokens: Any) -> None:
        start = time.monotonic()
        try:
            one = [scale[i : i + 1] for scale in tokens] if isinstance(tokens, list) else tokens[i : i + 1]
            image = self.pipe.decode(one)[0]
        except (ValueError, RuntimeError) as error:  # unfinished tokens may be no picture
            LOG.warning("no preview: %s", error)
            return
        finally:
            self._spent += time.monotonic() - start
        size = (picture.job.width, picture.job.height)
        self.metrics.previews.inc()
        shown = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)  # of the first scales
        picture.task.show(picture, picture_file(shown, picture.task.request))

    def _deliver(self, picture: Picture, image: Image.Image) -> None:
        if picture.over:
            return
        plan, request = picture.task.plan, picture.task.request
        file = picture_file(image, request, plan.metadata(picture.job))
        if picture.task.finish(picture, Made(file, text_tokens(self.pipe, picture.job))):
            self.metrics.pictures.labels("done").inc()


def picture_file(image: Image.Image, request: ImageRequest, metadata: dict[str, Any] | None = None) -> bytes:
    """The bytes of a picture file in the format of a request; a PNG carries `metadata`."""
    file = io.BytesIO()
    if request.format == "png":
        save_png(image, file, metadata)
    elif request.format == "jpeg":
        image.save(file, format="JPEG", quality=min(max(request.quality, 1), 95), subsampling=0)
    else:
        image.save(file, format="WEBP", quality=request.quality)
    return file.getvalue()
