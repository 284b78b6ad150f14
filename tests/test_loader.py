"""Loader processes: started from a clean process, never forked from one that has threads."""

import os

import torch

from stages.config import RunConfig
from stages.engine.loader import micro_batches
from stages.feed import MicroBatch


class Parents:
    """A feed that tells which process its loader process came from."""

    length, hash = 4, "parents"

    def batch(self, indices: range, generator: torch.Generator) -> MicroBatch:
        return MicroBatch(torch.tensor([os.getpid(), os.getppid()]), [str(index) for index in indices])


def test_a_loader_process_is_no_fork_of_the_training_process() -> None:
    """A fork takes over the locks of threads that it does not have: beside gloo's threads it hung for ever, about once in six
    runs of test_engine_zero.py."""
    found = [micro.batch.tolist() for micro in micro_batches(Parents(), RunConfig(out="x", batch_size=1, steps=3, workers=2), 0)]
    assert len(found) == 3 and all(os.getpid() not in pair for pair in found)
    alone = [micro.batch.tolist() for micro in micro_batches(Parents(), RunConfig(out="x", batch_size=1, steps=2), 0)]
    assert all(pair == [os.getpid(), os.getppid()] for pair in alone)
