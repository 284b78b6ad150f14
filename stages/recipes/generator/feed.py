"""The training samples of a generator, as loader processes see them: no weights."""

from collections.abc import Callable, Sequence

import torch

from stages.data.mixture import Mixture
from stages.data.skipping import Skips
from stages.feed import MicroBatch, sample_generator
from stages.recipes.generator.documents import Documents, Example, GeneratorBatch

Layout = Callable[[Documents, Sequence[Example]], GeneratorBatch]  # examples → batch; it is pickled, so it must not be a lambda


class GeneratorFeed:
    """See `stages.feed.Feed`. `lay_out` makes a batch of examples; distillation puts the teacher's batch beside the student's."""

    def __init__(self, mixture: Mixture, documents: Documents, seed: int, lay_out: Layout = Documents.batch) -> None:
        self.mixture, self.documents, self.seed, self.lay_out = mixture, documents, seed, lay_out
        self.length, self.hash = len(mixture), mixture.hash

    def batch(self, indices: range, generator: torch.Generator) -> MicroBatch:
        """The samples of these indices: captions, bits or pixels, noise."""
        skipped = Skips()
        examples = []
        for index in indices:
            reference = self.mixture.at(index)
            data = self.mixture.sources[reference.source].data
            examples.append(self.documents.example(data, reference, sample_generator(self.seed, index), skipped))
        batch = self.lay_out(self.documents, examples)
        names, sequence = [example.name for example in examples], batch.sequence
        return MicroBatch(batch, names, dict(skipped), sequence.tokens, sequence.ids_BL.numel(), skipped.names)
