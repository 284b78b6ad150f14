"""The teacher's own pictures: what the objective `samples` learns from."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitdance.generate import generate_bits
from bitdance.heads.diffusion.settings import choose
from distill.desk import Desk
from stages.data.bits import pack_bits
from stages.data.sample import CaptionedPicture, Skipped
from stages.generator.documents import slot_generator


@dataclass(frozen=True)
class Asked:
    """What is known of the sample in a slot: the picture will show one of its captions."""

    slot: int
    captions: list[str]
    attributes: dict[str, Any]


class Samples:
    """A `PictureSource`: for each slot one of its captions, and the bits of the picture that the teacher makes of it, with
    `distill.guidance` and so many sampler `steps` per block (default: the teacher's own).

    Caption, size and noise follow from the slot: a picture depends neither on its neighbours nor on the machine.
    """

    def __init__(self, desk: Desk, slots: range, batch_size: int, steps: int | None = None) -> None:
        self.desk, self.slots, self.batch_size, self.expected = desk, slots, batch_size, len(slots)
        defaults = desk.teacher.extras.get("defaults", {})
        self.sampling = choose(defaults, steps=steps, guidance=float(desk.distill.guidance))
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        waiting: dict[tuple[int, int], list[Asked]] = {}  # pictures of one size are made together
        for slot in self.slots:
            place = self.desk.mixture.at(slot)
            data = self.desk.sources[place.source].data
            try:
                captions, attributes = data.caption(place.number)
                size = self.desk.mixture.size(place, self.desk.buckets)
            except ValueError as error:
                yield Skipped(data.name(place.number), getattr(error, "reason", "cannot be read"), str(error))
                continue
            waiting.setdefault(size, []).append(Asked(slot, captions, attributes))
            if len(waiting[size]) == self.batch_size:
                yield from self._made(size, waiting.pop(size))
        for size, group in waiting.items():
            yield from self._made(size, group)

    def _made(self, size: tuple[int, int], group: list[Asked]) -> Iterator[CaptionedPicture]:
        desk, s = self.desk, self.desk.tokenizer.downsampling
        generators = [slot_generator(desk.seed, asked.slot) for asked in group]
        captions = [
            asked.captions[int(torch.rand((), generator=generator) * len(asked.captions))]
            for asked, generator in zip(group, generators, strict=True)
        ]
        grid = (size[0] // s, size[1] // s)
        bits_BChw = generate_bits(desk.teacher, captions, *grid, self.sampling, generators).cpu()
        for asked, caption, bits_Chw in zip(group, captions, bits_BChw, strict=True):
            bits = pack_bits(bits_Chw)
            self._digest.update(bits)
            yield CaptionedPicture(f"{asked.slot:09d}", None, [caption], asked.attributes, encoded=bits, ending="bits")

    def describe(self) -> dict[str, Any]:
        return {"name": "samples", **asdict(self.sampling), "sha256": self._digest.hexdigest(), **self.desk.origin()}
