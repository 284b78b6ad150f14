"""Micro-steps ahead of time: loader processes make them, in any number and with the same result.

A micro-step is a pure function of (seed, number, process), so the place in the data is the step number alone.
"""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from stages.config import RunConfig
from stages.data.skipping import name_skipped
from stages.recipe import Micro, Recipe


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The source of everything random in one step of one process."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)


class MicroSteps(Dataset[Micro]):
    """`[n]` is micro-step n of this process, counted from the start of the run.

    All processes together take `batch_size · world` slots of the endless row of samples, each its part of them.
    """

    def __init__(self, recipe: Recipe, run: RunConfig, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.run, self.rank, self.world = recipe, run, rank, world

    def __getitem__(self, number: int) -> Micro:
        size = self.run.batch_size
        first = (number * self.world + self.rank) * size
        return self.recipe.batch(range(first, first + size), step_generator(self.run.seed, number, self.rank))


def micro_steps(recipe: Recipe, run: RunConfig, start: int, rank: int = 0, world: int = 1) -> Iterator[Micro]:
    """All micro-steps from optimiser step `start` to the end of the run, in order; `run.workers` processes prepare them.

    Samples that could not be read are named once on standard error, whichever process met them.
    """
    numbers = range(start * run.accumulation, run.steps * run.accumulation)
    for micro in DataLoader(
        MicroSteps(recipe, run, rank, world),
        sampler=numbers,
        batch_size=None,
        num_workers=min(run.workers, len(numbers)),
        prefetch_factor=run.prefetch if run.workers and numbers else None,
        worker_init_fn=_begin_worker,
    ):
        name_skipped(micro.named)
        yield micro


def _begin_worker(worker: int) -> None:
    """One thread: the cores belong to training. Of signals, the training process alone decides; it ends its loaders."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
