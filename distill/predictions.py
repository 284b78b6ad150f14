"""What the teacher predicts of the data, ahead of training: `.targets` members beside the bits (see `targets.py`)."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from bitdance.model import Attention
from bitdance.sequence.batch import ImagePiece
from bitdance.sequence.patches import PatchPlan
from distill.desk import Desk
from distill.targets import Targets, cached_draws, settings
from distill.teacher import Teacher
from distill.view import teacher_views
from stages.data.bits import pack_bits
from stages.data.sample import CaptionedPicture
from stages.generator.documents import Drawn, slot_generator


@dataclasses.dataclass(frozen=True)
class Asked:
    """A document of one slot, the seed of its times and noise, and what goes into its sample."""

    slot: int
    seed: int
    document: Drawn
    caption: str
    attributes: dict[str, Any]

    @property
    def image(self) -> ImagePiece:
        image = self.document.pieces[-1]
        assert isinstance(image, ImagePiece)
        return image


class Predictions:
    """A `PictureSource`: for each slot the bits of its picture, one of its captions, and the teacher's predictions at times and
    noise that the student will meet again.
    """

    def __init__(self, desk: Desk, slots: range, batch_size: int) -> None:
        self.desk, self.slots, self.batch_size, self.expected = desk, slots, batch_size, len(slots)
        self._teacher, self._digest = Teacher(desk.teacher, desk.distill.guidance), hashlib.sha256()

    def __iter__(self) -> Iterator[CaptionedPicture]:
        for start in range(0, len(self.slots), self.batch_size):
            yield from self._predicted([self._asked(slot) for slot in self.slots[start : start + self.batch_size]])

    def _asked(self, slot: int) -> Asked:
        desk, generator = self.desk, slot_generator(self.desk.seed, slot)
        place = desk.mixture.at(slot)
        sample = desk.sources[place.source].data.take(place.number)
        caption = sample.captions[int(torch.rand((), generator=generator) * len(sample.captions))]
        seed = int(torch.randint(2**53, (), generator=generator))
        document = desk.documents.document(sample, place.resolution, caption, 0.0, generator)
        text, image = document.pieces
        assert isinstance(image, ImagePiece) and image.noise is not None
        draws = cached_draws(desk.head, image.bits_Chw[0].numel(), seed, image.noise.flipped_NC)
        document = dataclasses.replace(document, pieces=[text, dataclasses.replace(image, noise=draws)])
        return Asked(slot, seed, document, caption, sample.attributes)

    @torch.no_grad()
    def _predicted(self, group: list[Asked]) -> Iterator[CaptionedPicture]:
        desk, head, documents = self.desk, self.desk.head, self.desk.documents
        drawn = [asked.document for asked in group]
        batch = documents.batch(drawn)  # one document a row, so that pictures stand in the order of the documents
        views = teacher_views(drawn, batch.sequence, desk.teacher, documents.packed, desk.distill.folded)
        views = [view.to(desk.device) for view in views]
        sequence = batch.to(desk.device).encoded(desk.tokenizer, head.patch_side)
        attention: Attention = "flex" if desk.device.type == "cuda" else "dense"
        predicted = self._teacher.predict(views, sequence, attention).cpu()
        x_hat_SMPC, bits_NC = predicted.unflatten(0, (head.diff_batch_mul, -1)), sequence.image_bits_NC.cpu()
        grids = [asked.image.bits_Chw.shape[1:] for asked in group]
        tokens = [h * w for h, w in grids]
        parts = zip(
            group, grids, x_hat_SMPC.split([n // head.parallel_num for n in tokens], dim=1), bits_NC.split(tokens), strict=True
        )
        for asked, (h, w), x_hat, own_NC in parts:
            bits = pack_bits(PatchPlan(h, w, head.patch_side).unorder(own_NC[None])[0])
            targets = Targets(asked.seed, settings(head, desk.distill.guidance), x_hat).to_bytes()
            self._digest.update(bits + targets)
            key, captions = f"{asked.slot:09d}", [asked.caption]
            yield CaptionedPicture(key, None, captions, asked.attributes, encoded=bits, ending="bits", targets=targets)

    def describe(self) -> dict[str, Any]:
        return {"name": "targets", "sha256": self._digest.hexdigest(), **self.desk.origin()}
