"""The one autoregressive loop: conditions of a block → its bits → conditions of the next, for every causal kind of model.

B pictures, R rows of the network (B conditional, then with guidance B unconditional), K rows that are sampled, P tokens per
block, M blocks, C bits per token, D hidden size, S draws. Source: BitDance paper (arXiv 2602.14041), next-patch diffusion;
published code for the order of random draws.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import draws
from bitdance.heads.diffusion.settings import Sampling
from bitdance.sequence.patches import PatchPlan
from lfq_tokenizer.binary import binarize_unchecked, check_lost

OnBlock = Callable[[int, int, Tensor], None]
Noise = Callable[[int], Tensor]


class Predictor(Protocol):
    """A network with the pictures of one run in its memory: what the loop asks of a kind."""

    def begin(self) -> Tensor:
        """The conditions (R,P,D) of block 0."""
        ...

    def extend(self, bits_KPC: Tensor, m: int) -> Tensor:
        """Bits of block m → the conditions (R,P,D) of block m + 1. K = R, or B where all branches go on from the same bits."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the R rows alone."""
        ...


@torch.no_grad()
def predict(
    predictor: Predictor,
    sample: BlockSampler,
    plan: PatchPlan,
    blocks: Sequence[tuple[Sampling, int]],
    bits: int,
    generators: Sequence[torch.Generator],
    on_block: OnBlock | None = None,
    noise: Noise | None = None,
    cancelled: Collection[int] = (),
) -> Tensor:
    """One picture per generator → bits (B,C,h,w) in {-1,+1}, float32, on the device of the conditions.

    `blocks`: sampling and solver steps of each; `bits` per token. Where guidance acts in some blocks, the others are sampled for
    the unconditional rows too, on their own: each branch then goes on from its own bits, as in the published code. Otherwise
    both read the same.

    Picture i draws from `generators[i]` alone, per block the initial noise and one draw per stochastic step, of (1,P,C), or
    (2,P,C) where both branches are sampled; so it does not depend on its neighbours. `noise(rows)` replaces these draws by
    given ones of (rows,P,C), conditional rows first. `on_block(done, M, bits_BChw)` is called after each block, unfinished
    positions being 0; what it raises ends the run, and pictures whose number it adds to `cancelled` are not worked on any more.
    The network is called M times.
    """
    B, M, C = len(generators), len(blocks), bits
    P = plan.h * plan.w // M
    cond_RPD = predictor.begin()
    branches, alive = len(cond_RPD) // B, list(range(B))
    tokens_BNC = torch.zeros(B, plan.h * plan.w, C, device=cond_RPD.device)
    lost = tokens_BNC.new_zeros((), dtype=torch.long)
    for m, (sampling, steps) in enumerate(blocks):
        apart = 1 if sampling.guided else branches  # branches that are sampled on their own
        own = noise or _own_noise([generators[i] for i in alive], apart, P, C)
        drawn = [own(apart * len(alive)) for _ in range(draws(sampling.sampler, steps))]
        bits_KPC, nans = binarize_unchecked(sample(cond_RPD, _to(torch.stack(drawn), cond_RPD.device), sampling, steps))
        lost = lost + nans  # read at the end: until then nothing waits for the device
        there = slice(None) if len(alive) == B else alive  # a list of rows would be sent to the device
        tokens_BNC[there, m * P : (m + 1) * P] = bits_KPC[: len(alive)].float()
        if on_block is not None:
            on_block(m + 1, M, plan.unorder(tokens_BNC))
        going = [place for place, picture in enumerate(alive) if picture not in cancelled]
        if m == M - 1 or not going:  # the last block predicts nothing
            break
        if len(going) < len(alive):
            predictor.keep([branch * len(alive) + place for branch in range(branches) for place in going])
            bits_KPC = bits_KPC.unflatten(0, (-1, len(alive)))[:, going].flatten(0, 1)
            alive = [alive[place] for place in going]
        cond_RPD = predictor.extend(bits_KPC, m)
    check_lost(lost, tokens_BNC.numel())
    return plan.unorder(tokens_BNC)


def _own_noise(generators: Sequence[torch.Generator], apart: int, P: int, C: int) -> Noise:
    """The next standard normal draw (apart·B,P,C), float32, each picture's from its own generator, conditional rows first; on
    the generators' device if they share one."""
    together = len({g.device for g in generators}) == 1

    def draw(rows: int) -> Tensor:
        drawn = [torch.randn((apart, P, C), generator=g, device=g.device) for g in generators]
        return torch.stack(drawn if together else [d.cpu() for d in drawn], dim=1).flatten(0, 1)

    return draw


def _to(noise: Tensor, device: torch.device) -> Tensor:
    """All draws of a block in one transfer, for which nothing waits."""
    if device.type == "cuda" and not noise.is_cuda:
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)
