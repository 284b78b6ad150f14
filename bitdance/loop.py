"""The one autoregressive loop: what predicts a block → its tokens → what predicts the next, for every causal kind of model.

A kind brings two things: a `Predictor`, its network with the pictures of one run in its memory, and a `Canvas`, which samples
a block and keeps what was sampled. `predict` is the loop over patches of bits with a diffusion head.

B pictures, R rows of the network (B conditional, then with guidance B unconditional), K rows that are sampled, P tokens per
block, M blocks, C bits per token, D hidden size, S draws. Source: BitDance paper (arXiv 2602.14041), next-patch diffusion;
published code for the order of random draws.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bitdance.heads.diffusion.sampler import draws
from bitdance.heads.diffusion.settings import Sampling
from bitdance.sequence.patches import PatchPlan
from lfq_tokenizer.binary import binarize_unchecked, check_lost

OnBlock = Callable[[int, int, Any], None]
Noise = Callable[[int], Tensor]


class Sampler(Protocol):
    """The head's part of a block; see `BlockSampler`."""

    def __call__(self, cond_RPD: Tensor, noise_SBPC: Tensor, sampling: Sampling, steps: int) -> Tensor: ...


class Predictor(Protocol):
    """A network with the pictures of one run in its memory: what the loop asks of a kind."""

    def begin(self) -> Tensor:
        """What predicts block 0, (R,…): conditions of a head, or logits."""
        ...

    def extend(self, tokens_K: Tensor, m: int) -> Tensor:
        """Tokens of block m → what predicts block m + 1, (R,…). K = R, or B where all branches go on from the same tokens."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the R rows alone."""
        ...


class Canvas(Protocol):
    """Samples the blocks of the pictures of one run, and keeps what was sampled."""

    blocks: int  # M

    def sample(self, ahead_R: Tensor, m: int, pictures: Sequence[int]) -> Tensor:
        """Sample block m of these pictures from what predicts it, keep it, and return the tokens (K,…) that the network goes on
        from."""
        ...

    def tokens(self) -> Any:
        """All that was sampled so far, of all pictures."""
        ...


def run(
    predictor: Predictor, canvas: Canvas, count: int, on_block: OnBlock | None = None, cancelled: Collection[int] = ()
) -> Any:
    """`count` pictures, block after block → what the canvas holds in the end.

    `on_block(done, M, tokens)` is called after each block; what it raises ends the run, and pictures whose number it adds to
    `cancelled` are not worked on any more. The network is called M times.
    """
    ahead_R = predictor.begin()
    branches, alive = len(ahead_R) // count, list(range(count))
    for m in range(canvas.blocks):
        tokens_K = canvas.sample(ahead_R, m, alive)
        if on_block is not None:
            on_block(m + 1, canvas.blocks, canvas.tokens())
        going = [place for place, picture in enumerate(alive) if picture not in cancelled]
        if m == canvas.blocks - 1 or not going:  # the last block predicts nothing
            break
        if len(going) < len(alive):
            predictor.keep([branch * len(alive) + place for branch in range(branches) for place in going])
            tokens_K = tokens_K.unflatten(0, (-1, len(alive)))[:, going].flatten(0, 1)
            alive = [alive[place] for place in going]
        ahead_R = predictor.extend(tokens_K, m)
    return canvas.tokens()


@torch.no_grad()
def predict(
    predictor: Predictor,
    sample: Sampler,
    plan: PatchPlan,
    blocks: Sequence[tuple[Sampling, int]],
    bits: int,
    generators: Sequence[torch.Generator],
    on_block: OnBlock | None = None,
    noise: Noise | None = None,
    cancelled: Collection[int] = (),
    numbers: bool = False,
) -> Tensor:
    """One picture per generator → bits (B,C,h,w) in {-1,+1}, float32, on the device of the conditions.

    `blocks`: sampling and solver steps of each; `bits` per token. Where guidance acts in some blocks, the others are sampled for
    the unconditional rows too, on their own: each branch then goes on from its own bits, as in the published code. Otherwise
    both read the same.

    Picture i draws from `generators[i]` alone, per block the initial noise and one draw per stochastic step, of (1,P,C), or
    (2,P,C) where both branches are sampled; so it does not depend on its neighbours. `noise(rows)` replaces these draws by
    given ones of (rows,P,C), conditional rows first. `on_block(done, M, bits_BChw)` and `cancelled`: see `run`; unfinished
    positions are 0. `numbers`: what is sampled stays as it is instead of becoming bits.
    """
    canvas = PatchCanvas(sample, plan, blocks, bits, generators, noise, numbers)
    found: Tensor = run(predictor, canvas, len(generators), on_block, cancelled)
    canvas.check()
    return found


class PatchCanvas:
    """See `Canvas` and `predict`: patches of bits, sampled by a diffusion head."""

    def __init__(
        self,
        sample: Sampler,
        plan: PatchPlan,
        blocks: Sequence[tuple[Sampling, int]],
        bits: int,
        generators: Sequence[torch.Generator],
        noise: Noise | None,
        numbers: bool = False,
    ) -> None:
        self._decide = _unchanged if numbers else binarize_unchecked
        self._sample, self._plan, self._settings, self._generators, self._noise = sample, plan, blocks, generators, noise
        self.blocks, self.bits, self.P = len(blocks), bits, plan.h * plan.w // len(blocks)
        self._tokens_BNC: Tensor | None = None
        self._lost: Tensor | int = 0

    def sample(self, ahead_R: Tensor, m: int, pictures: Sequence[int]) -> Tensor:
        """Conditions (R,P,D) → bits (K,P,C)."""
        B, (sampling, steps) = len(self._generators), self._settings[m]
        if self._tokens_BNC is None:
            self._tokens_BNC = torch.zeros(B, self._plan.h * self._plan.w, self.bits, device=ahead_R.device)
        branches = len(ahead_R) // len(pictures)
        apart = 1 if sampling.guided else branches  # branches that are sampled on their own
        own = self._noise or _own_noise([self._generators[i] for i in pictures], apart, self.P, self.bits)
        drawn = [own(apart * len(pictures)) for _ in range(draws(sampling.sampler, steps))]
        bits_KPC, nans = self._decide(self._sample(ahead_R, _to(torch.stack(drawn), ahead_R.device), sampling, steps))
        self._lost = self._lost + nans  # read at the end: until then nothing waits for the device
        there = slice(None) if len(pictures) == B else list(pictures)  # a list of rows would be sent to the device
        self._tokens_BNC[there, m * self.P : (m + 1) * self.P] = bits_KPC[: len(pictures)].float()
        return bits_KPC

    def tokens(self) -> Tensor:
        """Bits (B,C,h,w), 0 where nothing was sampled."""
        assert self._tokens_BNC is not None
        return self._plan.unorder(self._tokens_BNC)

    def check(self) -> None:
        """ValueError where NaN was met."""
        assert isinstance(self._lost, Tensor) and self._tokens_BNC is not None
        check_lost(self._lost, self._tokens_BNC.numel())


def _unchanged(numbers_KPC: Tensor) -> tuple[Tensor, Tensor]:
    return numbers_KPC, torch.isnan(numbers_KPC).sum()


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
