"""The processes of a run: starting them, and what they tell each other. Without a launcher there is one, and nothing to tell.

Several are started by torchrun or deepspeed with the same command; each holds one GPU, or a share of the CPU.
"""

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the processes that a launcher started, or be the only one. Must come before the first learner."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed would compile its shared-memory operator at the first start: 40 s, and an error without a C++ compiler. Only its
    # inference path calls it. Naming the operators that may be used also saves the probing of compilers at every start.
    deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


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


def everyone(value: Any) -> list[Any]:
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
