"""The processes of a run: starting them, and what they tell each other. Without a launcher there is one, and nothing to tell.

Several are started by torchrun or deepspeed with the same command; each holds one GPU, or a share of the CPU.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A process that a shell started in the background outlives it on purpose; one that a launcher started does not.
SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh", "tmux", "screen", "sshd", "login", "systemd", "init")


def _launcher() -> int | None:
    """The process that started this one as one of a run's; None where a person did."""
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
    except OSError:
        name = ""
    return parent if "RANK" in os.environ and name.split(":")[0] not in SHELLS else None


LAUNCHER = _launcher()  # as it was when this process began


def orphaned() -> bool:
    """Whether the launcher of this process has ended without ending it, as after `kill -9` of torchrun."""
    return LAUNCHER is not None and os.getppid() != LAUNCHER


def start() -> None:
    """Join the processes that a launcher started, or be the only one. Must come before the first learner. One alone opens no
    port."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed would compile its shared-memory operator at the first start: 40 s, and an error without a C++ compiler. Only its
    # inference path calls it. Naming the operators that may be used also saves the probing of compilers at every start.
    deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        if os.environ["WORLD_SIZE"] == "1":
            _be_alone()
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
        atexit.register(_part)


def _part() -> None:
    """Leave the group while Python still runs. Gloo's threads would otherwise meet an interpreter that is gone, and abort a
    process whose work is done: 16 of 50, measured 2026-11-26 with pairs of processes that gather once and end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _be_alone() -> None:
    """A group of one, without sockets: gloo and NCCL listen even where there is nobody to talk to. Torch's fake group gives back
    what went in, which among one is what every collective does."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 (registers it)

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of each number over all processes, without gradient; the tensor itself where there is one process."""
    if world() == 1:
        return tensor
    return _reduced(tensor, dist.ReduceOp.SUM) / world()


def most_over_processes(tensor: Tensor) -> Tensor:
    """The greatest of each number over all processes."""
    if world() == 1:
        return tensor
    return _reduced(tensor, dist.ReduceOp.MAX)


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    """On the tensor's device, though NCCL reduces on the GPU alone."""
    shared = tensor.detach().to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(shared, op=operation)
    return shared.to(tensor.device)


def all_gather(value: Any) -> list[Any]:
    """What every process gave, in the order of their ranks. The value travels pickled."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """What process 0 gave."""
    if world() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


class Elsewhere(ValueError):
    """Another process failed, with these words."""


@contextmanager
def together() -> Iterator[None]:
    """The block succeeds on all processes or fails on all of them: who did well raises `Elsewhere` with the words of the first
    that failed, so that nobody waits for a process that has ended. All must take part."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if world() > 1:
        everywhere = all_gather(None if failed is None else f"{failed}")
        found = [f"process {number}: {said}" for number, said in enumerate(everywhere) if said is not None]
        if found and failed is None:
            raise Elsewhere(found[0])
    if failed is not None:
        raise failed
