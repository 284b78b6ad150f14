"""On CUDA every scale is one graph: a list of kernels that is recorded once and then replayed, without Python in between.

A graph reads and writes at fixed addresses, so what a run changes is copied into tensors that stay: the condition, the input of
a scale, the keys and values. A first run of a shape goes without graphs and warms everything up, the second records.

R rows, L tokens of a scale, T text tokens, D hidden size.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdance.kinds.next_scale.network import Condition, NextScaleNetwork
from bitdance.networks.memory import Memory
from lfq_tokenizer.scales import Side

TEXT_TOKENS = 64  # prompts are padded to a multiple of it
SHAPES_KEPT = 4  # each holds keys and values of its own

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class ScaleGraphs:
    """Keep one per network: the recorded shapes. `record(compute)` gives what replays it, and the tensor that it fills."""

    def __init__(self, network: NextScaleNetwork, record: Record | None = None) -> None:
        self.network, self._record = network, record or _Recorder()
        self._shapes: OrderedDict[tuple[Any, ...], ScaleRun | None] = OrderedDict()
        self._of: tuple[Any, ...] = ()  # the weights that the graphs belong to

    def of(self, condition: Condition, sides: Sequence[Side]) -> "ScaleRun | None":
        """What runs the scales of this condition, until `close`; None: this time without graphs, as another run has them or it is
        the first of its shape."""
        condition, weight = padded(condition), self.network.head.weight
        of = weight.data_ptr(), weight.device, weight.dtype, weight._version
        if of != self._of:
            self._shapes.clear()
            self._of = of
        key = (tuple(sides), *(None if part is None else part.shape for part in _parts(condition)))
        first = key not in self._shapes
        found = None if first else self._shapes[key] or ScaleRun(self.network, condition, sides, self._record)
        self._shapes[key] = found
        self._shapes.move_to_end(key)
        if len(self._shapes) > SHAPES_KEPT:
            self._shapes.popitem(last=False)
        return found if found is not None and found.begin(condition) else None


@dataclass
class _Scale:
    x_RLD: Tensor
    replay: Callable[[], None]
    logits: Tensor


class ScaleRun:
    """The scales of one shape; each is recorded when it is first asked for."""

    def __init__(self, network: NextScaleNetwork, condition: Condition, sides: Sequence[Side], record: Record) -> None:
        self.network, self.sides, self._record = network, list(sides), record
        self.condition = Condition(*(None if part is None else part.clone() for part in _parts(condition)))
        self.memory, self.turns = network.new_memory(sides), network.turns(sides)
        self._scales: list[_Scale] = []
        self._taken = Lock()

    def begin(self, condition: Condition) -> bool:
        """Take another condition of the same shape. False where another run, of another thread, is not yet done."""
        if not self._taken.acquire(blocking=False):
            return False
        for mine, new in zip(_parts(self.condition), _parts(condition), strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)
        return True

    def close(self) -> None:
        """The run is done, or given up."""
        self._taken.release()

    def __call__(self, x_RLD: Tensor, k: int) -> Tensor:
        """Input of scale k → logits (R,L,outputs); scales come in order."""
        if k == len(self._scales):
            mine = x_RLD.clone()
            replay, logits = self._record(lambda: self._compute(mine, k))
            self._scales.append(_Scale(mine, replay, logits))
        scale = self._scales[k]
        scale.x_RLD.copy_(x_RLD)
        scale.replay()
        return scale.logits.clone()

    def _compute(self, x_RLD: Tensor, k: int) -> Tensor:
        for layer in self.memory:
            layer.back_to(sum(h * w for h, w in self.sides[:k]))
        return self.network.run(x_RLD, self.condition, self.sides, k, self.memory, turns=self.turns)

    def leave(self, after: int) -> tuple[Condition, list[Memory]]:
        """The condition, and what the network remembers after so many scales, to go on without graphs."""
        return self.condition, [layer.copied(sum(h * w for h, w in self.sides[:after])) for layer in self.memory]


class _Recorder:
    """Records on CUDA; the graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may wait for its pictures meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            filled = compute()
        return graph.replay, filled


def padded(condition: Condition) -> Condition:
    """With prompts of the next whole multiple of 64 tokens, so that prompts of many lengths have one shape."""
    text_BTD, mask_BT = condition.text_BTD, condition.mask_BT
    if text_BTD is None:
        return condition
    B, T, _ = text_BTD.shape
    mask_BT = text_BTD.new_ones(B, T, dtype=torch.bool) if mask_BT is None else mask_BT
    more = -T % TEXT_TOKENS
    return Condition(condition.vector_BD, F.pad(text_BTD, (0, 0, 0, more)), F.pad(mask_BT, (0, more)))


def _parts(condition: Condition) -> tuple[Tensor | None, ...]:
    return condition.vector_BD, condition.text_BTD, condition.mask_BT
