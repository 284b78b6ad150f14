"""The head's part of the AR loop: condition and noise of a block → its predicted bits, with as little Python as possible.

On CUDA the head's blocks are compiled and all steps of a block are one CUDA graph, recorded once for a shape and then
replayed; prompts, their lengths and seeds change nothing in it. Elsewhere it runs as it stands.

B pictures, R rows (with guidance 2B), S draws, P tokens per block, C bits, D hidden size, W width of the head.
"""

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitdance.heads.diffusion.network import BinaryDiffusionHead, Trunk
from bitdance.heads.diffusion.sampler import SAMPLERS, guided_velocity
from bitdance.heads.diffusion.settings import Sampling

GRAPHS_KEPT = 96  # a graph is a list of kernels; its tensors share one pool with the others
TIMES_KEPT = 1024
WARM_UPS = 2


class _Compiled:
    """Compiled once for any number of rows (a single row is a case of its own); the plain trunk where that cannot be."""

    def __init__(self, trunk: Trunk) -> None:
        self.plain = trunk
        self.made: Trunk = torch.compile(trunk)

    def __call__(self, x_KPW: Tensor, y_KPW: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(x_KPW, 0)
        torch._dynamo.maybe_mark_dynamic(y_KPW, 0)
        try:
            return self.made(x_KPW, y_KPW)
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, no Triton, …
            reason = " ".join(str(error).split("\n\n")[0].split())  # advice for developers of compilers follows
            warnings.warn(f"the head runs uncompiled, torch.compile cannot work here: {reason}", stacklevel=2)
            self.made = self.plain
            return self.plain(x_KPW, y_KPW)


@dataclass
class _Graph:
    cond_RPD: Tensor
    noise_SBPC: Tensor
    predicted_BPC: Tensor
    graph: Any


class BlockSampler:
    """Keep one per model: it holds what was compiled and recorded, and the embedded times."""

    def __init__(self, head: BinaryDiffusionHead, compile: bool | None = None) -> None:
        """`compile=None`: on CUDA only, the place where it pays: on a CPU oneDNN with packed weights is quicker (`kernels.py`).
        With True elsewhere torch.compile is used without graphs; it needs a C++ compiler."""
        self.head = head
        self.compile = compile
        self._trunk: Trunk | None = None
        self._of: tuple[Any, ...] = ()  # the weights that times and graphs belong to
        self._times: dict[float, Tensor] = {}
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, cond_RPD: Tensor, noise_SBPC: Tensor, sampling: Sampling, steps: int) -> Tensor:
        """Predicted bits (B,P,C) of one block, float32. `noise_SBPC`: the initial noise, then one draw per stochastic step."""
        self._forget_old()
        compiled = cond_RPD.is_cuda if self.compile is None else self.compile
        if compiled and self._trunk is None:
            self._trunk = _Compiled(self.head.net.trunk)
        if not (compiled and cond_RPD.is_cuda):
            return self._solve(cond_RPD, noise_SBPC, sampling, steps, self._trunk if compiled else None)
        key = (cond_RPD.shape, cond_RPD.dtype, noise_SBPC.shape, sampling, steps)
        if key not in self._graphs:
            self._graphs[key] = self._record(cond_RPD, noise_SBPC, sampling, steps)
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        found = self._graphs[key]
        found.cond_RPD.copy_(cond_RPD)
        found.noise_SBPC.copy_(noise_SBPC)
        found.graph.replay()
        return found.predicted_BPC.clone()

    def _record(self, cond_RPD: Tensor, noise_SBPC: Tensor, sampling: Sampling, steps: int) -> _Graph:
        cond_RPD, noise_SBPC = cond_RPD.clone(), noise_SBPC.clone()
        solve = partial(self._solve, cond_RPD, noise_SBPC, sampling, steps, self._trunk)
        stream = torch.cuda.Stream(cond_RPD.device)
        stream.wait_stream(torch.cuda.current_stream(cond_RPD.device))
        with torch.cuda.stream(stream):  # compiles, and fills the embedded times
            for _ in range(WARM_UPS):
                solve()
        torch.cuda.current_stream(cond_RPD.device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may wait for its pictures meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            predicted_BPC = solve()
        return _Graph(cond_RPD, noise_SBPC, predicted_BPC, graph)

    def _solve(self, cond_RPD: Tensor, noise_SBPC: Tensor, sampling: Sampling, steps: int, trunk: Trunk | None) -> Tensor:
        head, B = self.head, noise_SBPC.shape[1]
        top = 0.0 if sampling.guidance_range is None else sampling.guidance_range[1]
        if top != head.config.guidance_max:
            raise ValueError(
                f"the model's defaults say guidance_range up to {top:g}, its head's config guidance_max = "
                f"{head.config.guidance_max:g}; take bitdance.json and the head from the same model"
            )
        embedded_RPW = head.prepare(cond_RPD)
        if top:
            embedded_RPW = embedded_RPW + head.embed_guidance(cond_RPD.new_full((1,), sampling.guidance, dtype=torch.float32))

        def denoise(x_BPC: Tensor, t: float, both: bool) -> Tensor:
            return head.denoise(x_BPC, self._time(t), embedded_RPW if both else embedded_RPW[:B], trunk)

        velocity = partial(guided_velocity, denoise, guidance=sampling.between_branches, interval=sampling.guidance_interval)
        solve, draws = SAMPLERS[sampling.sampler], iter(noise_SBPC)
        return solve(velocity, next(draws), steps, draws.__next__, head.config.time_shift)

    def _time(self, t: float) -> Tensor:
        if t not in self._times:
            self._times[t] = self.head.embed_time(t)
        return self._times[t]

    def _forget_old(self) -> None:
        """What belongs to weights that were moved, converted, loaded or trained since. Graphs read the embedded times, so both go
        together."""
        weight = self.head.net.time_embed.mlp[0].weight
        of = weight.data_ptr(), weight.device, weight.dtype, weight._version
        if of != self._of or len(self._times) >= TIMES_KEPT:
            self._of = of
            self._times.clear()
            self._graphs.clear()
