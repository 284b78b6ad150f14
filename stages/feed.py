"""What a recipe sends to loader processes: a description of the training samples, without any weights."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass
class MicroBatch:
    """What one process computes in one micro-step. Made by a loader process, so it holds nothing that cannot be sent."""

    batch: Any  # on the CPU, with .to(device)
    samples: list[str]  # their names, for messages
    skipped: dict[str, int] = field(default_factory=dict)  # samples that could not be read and were replaced, by reason
    tokens: int = 0  # of the sequence, without padding; 0 where there is no sequence
    positions: int = 0  # with padding
    named: dict[str, str] = field(default_factory=dict)  # the samples that were replaced → why


class Feed(Protocol):
    """The samples of a run stand in one endless row; `batch(indices, generator)` makes the part `indices` of it.

    A batch is a pure function of its arguments. What is random about one sample depends on its index in the row
    (`sample_generator`), so that it does not change with the number of processes; `generator` serves a batch as a whole.
    A feed is pickled for every loader process, so it must not hold a network.
    """

    length: int  # training samples
    hash: str  # identity of the data, so that a resumed run notices other shards

    def batch(self, indices: range, generator: torch.Generator) -> MicroBatch: ...


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The source of everything random about the sample at an index of the endless row."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) * 8191 % 2**63)
