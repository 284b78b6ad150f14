"""The loop of refinement: predict all labels, keep a random part of the prediction, let the rest go back to noise, again.

What was kept may be predicted otherwise or erased at the next step; only the last prediction counts. This is no step of the
autoregressive loop (`bitdance.loop`), which never takes a bit back.

B pictures, G labels per token, V values of a label, h w token grid.
Source: GRN paper (arXiv 2604.13030), sampling; published code for the order of random draws.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitdance.heads.categorical import draw
from bitdance.kinds.refine.config import RefineConfig
from bitdance.kinds.refine.settings import RefineSettings

OnStep = Callable[[int, int, Tensor], None]
LOST = "the network gives NaN; use a dtype with a wider range (bfloat16 or float32), or check the weights (bitdance verify)"


class Predictor(Protocol):
    """A network with the conditions of the pictures of one run: what the loop asks of it."""

    config: RefineConfig
    device: torch.device

    def logits(self, pictures: Sequence[int], labels_BGhw: Tensor, time_B: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """Logits (B,G,h,w,V) of these pictures, with their condition and, if `guided`, without."""
        ...


class Draws(Protocol):
    """The random numbers of a run, for the pictures that are still at work."""

    def labels(self, pictures: Sequence[int]) -> Tensor:
        """(B,G,h,w) labels from 0 to V - 1."""
        ...

    def exponential(self, pictures: Sequence[int]) -> Tensor:
        """(B,G,h,w,V) standard exponential numbers, which choose a value with the probabilities of a prediction."""
        ...

    def uniform(self, pictures: Sequence[int]) -> Tensor:
        """(B,G,h,w) numbers in [0, 1), which decide what is kept."""
        ...


@dataclass(frozen=True)
class OwnDraws:
    """Each picture's from its own generator, as the published code draws for one picture after seeding. Where `by_token`, the
    exponential numbers come token by token, otherwise label by label."""

    generators: Sequence[torch.Generator]
    config: RefineConfig
    grid: tuple[int, int]
    by_token: bool

    def labels(self, pictures: Sequence[int]) -> Tensor:
        shape = (self.config.label_count, *self.grid)
        return self._each(pictures, lambda g: torch.randint(0, self.config.values, shape, generator=g, device=g.device))

    def exponential(self, pictures: Sequence[int]) -> Tensor:
        G, V = self.config.label_count, self.config.values
        shape = (*self.grid, G, V) if self.by_token else (G, *self.grid, V)
        drawn = self._each(pictures, lambda g: torch.empty(shape, device=g.device).exponential_(1, generator=g))
        return drawn.movedim(3, 1) if self.by_token else drawn

    def uniform(self, pictures: Sequence[int]) -> Tensor:
        shape = (self.config.label_count, *self.grid)
        return self._each(pictures, lambda g: torch.rand(shape, generator=g, device=g.device))

    def _each(self, pictures: Sequence[int], numbers: Callable[[torch.Generator], Tensor]) -> Tensor:
        drawn = [numbers(self.generators[i]) for i in pictures]
        return torch.stack(drawn if len({d.device for d in drawn}) == 1 else [d.cpu() for d in drawn])


@dataclass(frozen=True)
class Start:
    """Pictures to go on from. `labels_BGhw` are theirs, and where `fixed_Bhw` is True they stay. Of the others the share that
    the schedule keeps at progress 1 - strength stays at first, and the steps before are left out."""

    labels_BGhw: Tensor
    fixed_Bhw: Tensor
    strength: float = 1.0


class Pace:
    """How far each picture is: the steps that it has and took, its progress from 0 to 1, and what the network is told of it."""

    def __init__(self, settings: RefineSettings, count: int, first: int) -> None:
        """Steps before `first` are left out."""
        self.settings, self.first = settings, first
        self.totals, self.taken = [settings.steps] * count, [0] * count
        self.progress = [first / settings.steps] * count
        self.told = [0.0] * count  # the share of kept labels
        self.heat = [1.0] * count  # of the temperature

    def adapt(self, pictures: Sequence[int], step: int, entropy_B: Tensor) -> None:
        """At the end of the warm-up: how many steps each picture needs, and how hot they are."""
        rule = self.settings.adaptive
        if rule is None or step != self.first + rule.warmup:
            return
        for p, entropy in zip(pictures, entropy_B.tolist(), strict=True):
            more = rule.more_steps(entropy, self.settings.steps - self.first)
            self.totals[p], self.heat[p] = step + more, min(max((more - 10) / 40 + 0.5, 0.5), 1.0)

    def advance(self, pictures: Sequence[int], step: int) -> list[float]:
        """The share of labels that each picture keeps after this step."""
        for p in pictures:
            self.progress[p] += (1 - self.progress[p]) / (self.totals[p] - step)
            self.taken[p] += 1
        return [self.settings.share(self.progress[p]) for p in pictures]

    def settled(self, picture: int) -> bool:
        """Whether the step that was just taken saw a finished picture."""
        return self.settings.tells_kept_share and self.told[picture] >= self.settings.end_share


@torch.no_grad()
def refine(
    predictor: Predictor,
    settings: RefineSettings,
    draws: Draws,
    count: int,
    on_step: OnStep | None = None,
    cancelled: Collection[int] = (),
    start: Start | None = None,
    spent: list[int] | None = None,
) -> Tensor:
    """`count` pictures → labels (B,G,h,w) on the predictor's device.

    Picture i draws its random labels once, then at every step what chooses the values and what is kept; so it does not depend on
    its neighbours. `on_step(done, steps, labels_BGhw)` is called after each step with the predictions so far; what it raises ends
    the run, and pictures whose number it adds to `cancelled` are not worked on any more. A finished picture leaves the batch.
    `spent` gets the steps that each picture took. ValueError for NaN.
    """
    device, alive = predictor.device, list(range(count))
    first = 0 if start is None else settings.steps - max(1, round(start.strength * settings.steps))
    pace = Pace(settings, count, first)
    random_BGhw = draws.labels(alive).to(device)
    result_BGhw, seen_BGhw = random_BGhw.clone(), random_BGhw
    fixed_BGhw = torch.zeros_like(random_BGhw, dtype=torch.bool)
    if start is not None:
        result_BGhw = start.labels_BGhw.to(device).clone()
        fixed_BGhw |= start.fixed_Bhw.to(device)[:, None]
        kept_BGhw = (draws.uniform(alive).to(device) < (settings.share(first / settings.steps) if first else 0.0)) | fixed_BGhw
        seen_BGhw = torch.where(kept_BGhw, result_BGhw, random_BGhw)
        pace.told = kept_BGhw.float().mean(dim=(1, 2, 3)).tolist()
    lost = torch.zeros((), dtype=torch.long, device=device)
    for step in range(first, settings.steps):
        time_B = torch.tensor([pace.told[p] for p in alive])  # on the host, where the way is decided
        guidance_B = settings.guidance_at(time_B)
        logits, without = predictor.logits(alive, seen_BGhw, time_B.to(device), bool((guidance_B != 1).any()))
        if settings.adaptive:
            pace.adapt(alive, step, entropies(logits))
        if without is not None:
            g = guidance_B.to(device)[:, None, None, None, None]
            logits = torch.where(g == 1, logits, without + g * (logits - without))
        lost = lost + torch.isnan(logits).sum()  # read at the end: until then nothing waits for the device
        tau_B = torch.tensor([settings.tau * pace.heat[p] for p in alive], device=device)
        chosen_BGhw = draw(logits / tau_B[:, None, None, None, None], draws.exponential(alive).to(device))
        fixed, known = fixed_BGhw[alive], result_BGhw[alive]
        result_BGhw[alive] = chosen_BGhw = torch.where(fixed, known, chosen_BGhw)

        settled = [pace.settled(p) for p in alive]
        shares = pace.advance(alive, step)
        kept_BGhw = (draws.uniform(alive).to(device) < torch.tensor(shares, device=device)[:, None, None, None]) | fixed
        seen_BGhw = torch.where(kept_BGhw, chosen_BGhw, random_BGhw[alive])
        if settings.tells_kept_share or start is not None:
            shares = kept_BGhw.float().mean(dim=(1, 2, 3)).tolist()
        for p, share in zip(alive, shares, strict=True):
            pace.told[p] = share
        if on_step is not None:
            on_step(step + 1 - first, max(pace.totals[p] for p in alive) - first, result_BGhw)
        going = [k for k, p in enumerate(alive) if step + 1 < pace.totals[p] and p not in cancelled and not settled[k]]
        if not going:
            break
        if len(going) < len(alive):
            alive, seen_BGhw = [alive[k] for k in going], seen_BGhw[going]
    if int(lost):
        raise ValueError(LOST)
    if spent is not None:
        spent[:] = pace.taken
    return result_BGhw


def entropies(logits_BGhwV: Tensor) -> Tensor:
    """The mean entropy of each picture's labels (B,), as a share of the most that there can be."""
    log_p = logits_BGhwV.float().log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1).mean(dim=(1, 2, 3)) / math.log(logits_BGhwV.shape[-1])
