"""Micro-batches ahead of time: loader processes make them, in any number and with the same result.

A micro-batch is a pure function of (seed, number, process), so the place in the data is the step number alone.

Loader processes are not forked from training: a fork takes over the locks of threads that it does not have (gloo's, OpenMP's),
and then waits for them for ever. They start from a clean process and get the feed alone, pickled; never a weight.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.context import BaseContext

import torch
from torch.utils.data import DataLoader, Dataset

from stages.config import RunConfig
from stages.data.skipping import name_skipped
from stages.feed import Feed, MicroBatch


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The source of everything random in one step of one process."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)


class MicroBatches(Dataset[MicroBatch]):
    """`[n]` is micro-batch n of this process, counted from the start of the run.

    All processes together take `batch_size · world` samples of the endless row, each its part of them.
    """

    def __init__(self, feed: Feed, run: RunConfig, rank: int = 0, world: int = 1) -> None:
        self.feed, self.run, self.rank, self.world = feed, run, rank, world

    def __getitem__(self, number: int) -> MicroBatch:
        size = self.run.batch_size
        first = (number * self.world + self.rank) * size
        return self.feed.batch(range(first, first + size), step_generator(self.run.seed, number, self.rank))


def micro_batches(feed: Feed, run: RunConfig, start: int, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
    """All micro-batches from optimiser step `start` to the end of the run, in order; `run.workers` processes prepare them.

    Samples that could not be read are named once on standard error, whichever process met them.
    """
    numbers = range(start * run.accumulation, run.steps * run.accumulation)
    workers = min(run.workers, len(numbers))
    for micro in DataLoader(
        MicroBatches(feed, run, rank, world),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=run.prefetch if workers else None,
        multiprocessing_context=_context(feed) if workers else None,
        worker_init_fn=_begin_worker,
    ):
        name_skipped(micro.named)
        yield micro


def _context(feed: Feed) -> BaseContext:
    """Where there is a fork server it imports the feed's module once for all loader processes; elsewhere each one does."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(feed).__module__])
    return context


def _begin_worker(worker: int) -> None:
    """One thread: the cores belong to training. Of signals, the training process alone decides; it ends its loaders."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
