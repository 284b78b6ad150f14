"""The teacher's own pictures: what the objective `samples` learns from."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitdance.generate import generate_bits
from bitdance.heads.diffusion.settings import choose
from distill.context import TeacherContext
from stages.data.bits import pack_bits
from stages.data.sample import CaptionedPicture, Skipped
from stages.feed import sample_generator


@dataclass(frozen=True)
class Asked:
    """What is known of the sample at an index: the picture will show one of its captions."""

    index: int
    captions: list[str]
    attributes: dict[str, Any]


class Samples:
    """A `PictureSource`: for each index one of its captions, and the bits of the picture that the teacher makes of it, with
    `distill.guidance` and so many sampler `steps` per block (default: the teacher's own).

    Caption, size and noise follow from the index: a picture depends neither on its neighbours nor on the machine.
    """

    def __init__(self, context: TeacherContext, indices: range, batch_size: int, steps: int | None = None) -> None:
        self.context, self.indices, self.batch_size, self.expected = context, indices, batch_size, len(indices)
        defaults = context.teacher.extras.get("defaults", {})
        self.sampling = choose(defaults, steps=steps, guidance=float(context.distill.guidance))
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[CaptionedPicture | Skipped]:
        waiting: dict[tuple[int, int], list[Asked]] = {}  # pictures of one size are made together
        for index in self.indices:
            reference = self.context.mixture.at(index)
            data = self.context.sources[reference.source].data
            try:
                captions, attributes = data.caption(reference.number)
                size = self.context.mixture.size(reference, self.context.buckets)
            except ValueError as error:
                yield Skipped(data.name(reference.number), getattr(error, "reason", "cannot be read"), str(error))
                continue
            waiting.setdefault(size, []).append(Asked(index, captions, attributes))
            if len(waiting[size]) == self.batch_size:
                yield from self._made(size, waiting.pop(size))
        for size, group in waiting.items():
            yield from self._made(size, group)

    def _made(self, size: tuple[int, int], group: list[Asked]) -> Iterator[CaptionedPicture]:
        context, s = self.context, self.context.tokenizer.downsampling
        generators = [sample_generator(context.seed, asked.index) for asked in group]
        captions = [
            asked.captions[int(torch.rand((), generator=generator) * len(asked.captions))]
            for asked, generator in zip(group, generators, strict=True)
        ]
        grid = (size[0] // s, size[1] // s)
        bits_BChw = generate_bits(context.teacher, captions, *grid, self.sampling, generators).cpu()
        for asked, caption, bits_Chw in zip(group, captions, bits_BChw, strict=True):
            bits = pack_bits(bits_Chw)
            self._digest.update(bits)
            yield CaptionedPicture(f"{asked.index:09d}", None, [caption], asked.attributes, encoded=bits, ending="bits")

    def describe(self) -> dict[str, Any]:
        return {"name": "samples", **asdict(self.sampling), "sha256": self._digest.hexdigest(), **self.context.origin()}
