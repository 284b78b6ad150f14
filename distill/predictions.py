"""What the teacher predicts of the data, ahead of training: `.targets` members beside the bits (see `targets.py`)."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from bitdance.model import Attention
from bitdance.sequence.batch import ImagePiece
from bitdance.sequence.patches import PatchPlan, patch_side
from distill.context import TeacherContext
from distill.documents import TeacherLayout
from distill.targets import Targets, cached_noise, settings
from distill.teacher import Teacher
from stages.data.bits import pack_bits
from stages.data.sample import CaptionedPicture
from stages.feed import sample_generator
from stages.recipes.generator.documents import Example


@dataclasses.dataclass(frozen=True)
class Asked:
    """The example of one index, the seed of its times and noise, and what goes into its sample."""

    index: int
    seed: int
    example: Example
    caption: str
    attributes: dict[str, Any]

    @property
    def image(self) -> ImagePiece:
        image = self.example.pieces[-1]
        assert isinstance(image, ImagePiece)
        return image


class Predictions:
    """A `PictureSource`: for each index the bits of its picture, one of its captions, and the teacher's predictions at times and
    noise that the student will meet again.
    """

    def __init__(self, context: TeacherContext, indices: range, batch_size: int) -> None:
        self.context, self.indices, self.batch_size, self.expected = context, indices, batch_size, len(indices)
        self._teacher, self._digest = Teacher(context.teacher, context.distill.guidance), hashlib.sha256()

    def __iter__(self) -> Iterator[CaptionedPicture]:
        for start in range(0, len(self.indices), self.batch_size):
            yield from self._predicted([self._asked(index) for index in self.indices[start : start + self.batch_size]])

    def _asked(self, index: int) -> Asked:
        context, generator = self.context, sample_generator(self.context.seed, index)
        reference = context.mixture.at(index)
        sample = context.sources[reference.source].data.take(reference.number)
        caption = sample.captions[int(torch.rand((), generator=generator) * len(sample.captions))]
        seed = int(torch.randint(2**53, (), generator=generator))
        example = context.documents.with_noise(sample, reference.resolution, caption, 0.0, generator)
        text, image = example.pieces
        assert isinstance(image, ImagePiece) and image.noise is not None
        noise = cached_noise(context.head, image.bits_Chw[0].numel(), seed, image.noise.flipped_NC)
        example = dataclasses.replace(example, pieces=[text, dataclasses.replace(image, noise=noise)])
        return Asked(index, seed, example, caption, sample.attributes)

    @torch.no_grad()
    def _predicted(self, group: list[Asked]) -> Iterator[CaptionedPicture]:
        context, head, documents = self.context, self.context.head, self.context.documents
        examples = [asked.example for asked in group]
        batch = documents.batch(examples)  # one a row, so that pictures stand in the order of the examples
        layout = TeacherLayout.of(context.teacher, context.distill.folded)
        views = [view.to(context.device) for view in layout.views(examples, batch.sequence, documents.packed)]
        sequence = batch.to(context.device).encoded(context.tokenizer, patch_side(head.parallel_num))
        attention: Attention = "flex" if context.device.type == "cuda" else "dense"
        predicted = self._teacher.predict(views, sequence, attention).cpu()
        x_hat_SMPC, bits_NC = predicted.unflatten(0, (head.diff_batch_mul, -1)), sequence.image_bits_NC.cpu()
        grids = [asked.image.bits_Chw.shape[1:] for asked in group]
        tokens = [h * w for h, w in grids]
        parts = zip(
            group, grids, x_hat_SMPC.split([n // head.parallel_num for n in tokens], dim=1), bits_NC.split(tokens), strict=True
        )
        for asked, (h, w), x_hat, own_NC in parts:
            bits = pack_bits(PatchPlan(h, w, patch_side(head.parallel_num)).unorder(own_NC[None])[0])
            targets = Targets(asked.seed, settings(head, context.distill.guidance), x_hat).to_bytes()
            self._digest.update(bits + targets)
            key, captions = f"{asked.index:09d}", [asked.caption]
            yield CaptionedPicture(key, None, captions, asked.attributes, encoded=bits, ending="bits", targets=targets)

    def describe(self) -> dict[str, Any]:
        return {"name": "targets", "sha256": self._digest.hexdigest(), **self.context.origin()}
