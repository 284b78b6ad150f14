"""The teacher's own pictures: what the objective `samples` learns from."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from bitdance.generate import generate_bits
from bitdance.sampling import choose
from distill.desk import Desk
from stages.data.bits import pack_bits
from stages.data.mixture import Place
from stages.data.sample import CaptionedPicture
from stages.generator.documents import slot_generator


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

    def __iter__(self) -> Iterator[CaptionedPicture]:
        waiting: dict[tuple[int, int], list[tuple[int, Place]]] = {}  # pictures of one size are made together
        for slot in self.slots:
            place = self.desk.mixture.at(slot)
            size = self.desk.mixture.size(place, self.desk.buckets)
            waiting.setdefault(size, []).append((slot, place))
            if len(waiting[size]) == self.batch_size:
                yield from self._made(size, waiting.pop(size))
        for size, group in waiting.items():
            yield from self._made(size, group)

    def _made(self, size: tuple[int, int], group: list[tuple[int, Place]]) -> Iterator[CaptionedPicture]:
        desk, s = self.desk, self.desk.tokenizer.downsampling
        captions: list[str] = []
        attributes: list[dict[str, Any]] = []
        generators = [slot_generator(desk.seed, slot) for slot, _ in group]
        for (_, place), generator in zip(group, generators, strict=True):
            known, about = desk.sources[place.source].data.caption(place.number)
            captions.append(known[int(torch.rand((), generator=generator) * len(known))])
            attributes.append(about)
        grid = (size[0] // s, size[1] // s)
        bits_BChw = generate_bits(desk.teacher, captions, *grid, self.sampling, generators).cpu()
        for (slot, _), caption, about, bits_Chw in zip(group, captions, attributes, bits_BChw, strict=True):
            bits = pack_bits(bits_Chw)
            self._digest.update(bits)
            yield CaptionedPicture(f"{slot:09d}", None, [caption], about, encoded=bits, ending="bits")

    def describe(self) -> dict[str, Any]:
        return {"name": "samples", **asdict(self.sampling), "sha256": self._digest.hexdigest(), **self.desk.origin()}
