"""Which numbers of every parameter this process updates, for each stage of ZeRO, and how what it wrote reaches the module.

    ZeRO 0     every process updates whole parameters, all the same
    ZeRO 1, 2  parameters lie in one long vector per optimiser group; a process updates a stretch of it, in float32
    ZeRO 3     every parameter is cut into equal pieces, of which a process holds and updates one

This is the only place that knows how DeepSpeed lays them out (version 0.19).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.engine import processes


@dataclass(frozen=True)
class Fragment:
    """`count` numbers of the parameter `name`, from number `start` of its flattened form on.

    The optimiser updates the tensor `flat` and keys its state by it; the fragment lies there from `offset` on.
    """

    name: str
    start: int
    count: int
    flat: Tensor
    offset: int = 0

    def read(self, tensor: Tensor) -> Tensor:
        """The fragment's numbers in `flat` or in a state of the same shape."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.count]

    @torch.no_grad()
    def write(self, tensor: Tensor, numbers: Tensor) -> None:
        if tensor.dim() == 1:
            tensor[self.offset : self.offset + self.count] = numbers
        else:  # a whole parameter, whatever its order in memory
            tensor.copy_(numbers.view(tensor.shape))


def size(parameter: nn.Parameter) -> int:
    """The number of its elements, also where the module holds a piece of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def trained(engine: Any) -> list[Fragment]:
    """What this process updates. Together the processes hold every parameter that trains: once, or each all of them (ZeRO 0)."""
    parameters = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [Fragment(name, 0, p.numel(), p) for name, p in parameters]
    if stage == 3:
        return [found for name, p in parameters if (found := _piece(engine.optimizer, name, p)).count]
    return [_stretch(engine.optimizer, name, p) for name, p in parameters if p._hp_mapping is not None]


def _stretch(optimizer: Any, name: str, parameter: Any) -> Fragment:
    mapping = parameter._hp_mapping
    (flat,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
    inside, outside = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, inside.start, inside.numel, flat, outside.start)


def _piece(optimizer: Any, name: str, parameter: Any) -> Fragment:
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = processes.rank() * length
    count = max(0, min(length, parameter.ds_numel - start))  # the last piece is padded
    return Fragment(name, start, count, optimizer.fp32_partitioned_groups_flat[group], offset)


def frozen(engine: Any) -> list[Fragment]:
    """The same for parameters that do not train; `flat` is where the module holds them."""
    found = []
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            length = p.ds_tensor.numel()
            start = processes.rank() * length
            found.append(Fragment(name, start, max(0, min(length, p.ds_numel - start)), p.ds_tensor))
        else:
            found.append(Fragment(name, 0, p.numel(), p))
    return [fragment for fragment in found if fragment.count]


@contextmanager
def writing(engine: Any) -> Iterator[None]:
    """What is written to the fragments inside is what the module computes with afterwards. All processes must take part."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # no process holds a whole parameter any more
    yield
    if stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # but for small ones, which DeepSpeed keeps whole
    elif stage:
        optimizer.update_lp_params()


@contextmanager
def whole(engine: Any) -> Iterator[nn.Module]:
    """The plain module with whole parameters in every process. Under ZeRO 3 each needs the memory of the whole module for it."""
    if engine.zero_optimization_stage() < 3:
        yield engine.module
        return
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    with unwrap_model_for_generation(engine):
        yield engine.module
    engine.optimizer.checkpoint_event_epilogue()
