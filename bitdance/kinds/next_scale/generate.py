"""Conditions → tokens of every scale, by the autoregressive loop (`bitdance.loop`).

B pictures, R rows (B conditional, then with guidance B unconditional), K scales of (h_k, w_k), Z numbers of a token's input, T
bits of a token or V codes. Sources: public codes of VAR and Infinity for the order of random draws.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bitdance.heads.categorical import draw, filtered, softened
from bitdance.kinds.next_scale.graphs import ScaleGraphs
from bitdance.kinds.next_scale.network import Condition, NextScaleNetwork
from bitdance.kinds.next_scale.settings import NextScaleSettings, smoothing
from bitdance.loop import OnBlock, run
from bitdance.networks.text_encoder import TextEncoder
from lfq_tokenizer.scales import ScaleCodes, ScaleQuantizer, Side

LOST = "the network gives NaN; use a dtype with a wider range (bfloat16 or float32), or check the weights (bitdance verify)"


class Exponential(Protocol):
    """The random numbers of a run."""

    def __call__(self, pictures: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard exponential numbers for these pictures."""
        ...


def own_draws(generators: Sequence[torch.Generator]) -> Exponential:
    """Each picture's from its own generator, as the published codes draw for one picture after seeding."""

    def numbers(pictures: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        drawn = [torch.empty(shape, device=g.device).exponential_(1, generator=g) for g in (generators[i] for i in pictures)]
        return torch.stack(drawn if len({d.device for d in drawn}) == 1 else [d.cpu() for d in drawn])

    return numbers


def condition_of(
    network: NextScaleNetwork,
    text: TextEncoder | None,
    conditions: Sequence[Any],
    guided: bool,
    negative: Sequence[str] | None = None,
) -> Condition:
    """What a batch is made of, class numbers or prompts, and where guided what stands against each: no class, no prompt, or a
    negative prompt."""
    device = network.pos_start.device
    if text is None:
        rows = [*conditions, *[network.null_class] * len(conditions)] if guided else list(conditions)
        return network.of_classes(torch.tensor(rows, device=device))

    def features(prompts: Sequence[str]) -> list[Tensor]:
        return [one[: network.config.text_tokens].to(device) for one in text.encode(prompts)]

    of = features(conditions)
    if not guided:
        return network.of_text(of)
    against = features(negative) if negative is not None else [network.cfg_uncond[: len(one)].detach() for one in of]
    return network.of_text([*of, *against])


class Given:
    """Tokens of a picture that stay: `tokens` of every scale, `keep` bool (B,h_k,w_k) of every scale."""

    def __init__(self, tokens: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
        self.tokens, self.keep = list(tokens), list(keep)


@torch.no_grad()
def generate_tokens(
    network: NextScaleNetwork,
    quantizer: ScaleQuantizer,
    condition: Condition,
    sides: Sequence[Side],
    settings: NextScaleSettings,
    exponential: Exponential,
    count: int,
    on_block: OnBlock | None = None,
    cancelled: Collection[int] = (),
    given: Given | None = None,
    graphs: ScaleGraphs | None = None,
) -> "ScaleCanvas":
    """`count` pictures → their canvas: `.scales` are the tokens, `.total` the sum that a decoder reads. `condition`: of the
    pictures and, where the settings are guided, of what stands against each. `graphs`: those of the network, on CUDA."""
    settings.check_scales(len(sides))
    predictor = _Predictor(network, condition, sides, settings, graphs)
    canvas = ScaleCanvas(network, quantizer, sides, settings, exponential, count, given)
    try:
        run(predictor, canvas, count, on_block, cancelled)
    finally:
        predictor.close()
    if bool(torch.isnan(canvas.total).any()):
        raise ValueError(LOST)
    return canvas


class _Predictor:
    """See `bitdance.loop.Predictor`: logits of the next scale. Both branches read what was sampled with the condition."""

    def __init__(
        self,
        network: NextScaleNetwork,
        condition: Condition,
        sides: Sequence[Side],
        settings: NextScaleSettings,
        graphs: ScaleGraphs | None,
    ) -> None:
        self.network, self.condition, self.sides, self.settings = network, condition, list(sides), settings
        self.inner = [len(network.blocks) + j for j in settings.insertion if j < 0] if settings.guided else []
        self.recorded = None if graphs is None or self.inner else graphs.of(condition, sides)
        self.done, self.memory = 0, network.new_memory(sides)
        self.turns = network.turns(sides) if self.recorded is None else self.recorded.turns

    def begin(self) -> Tensor:
        return self._run(self.network.start(self.condition), 0)

    def extend(self, tokens_K: Tensor, m: int) -> Tensor:
        """`tokens_K` (B,Z,h,w): the sum so far, shrunk to the next scale."""
        branches = len(self.condition.vector_BD) // len(tokens_K)
        before = sum(h * w for h, w in self.sides[: m + 1])
        x_BLD = self.network.embed(tokens_K, m + 1, before)
        return self._run(x_BLD.repeat(branches, 1, 1), m + 1)

    def _run(self, x_BLD: Tensor, k: int) -> Tensor:
        self.done = k + 1
        if self.recorded is not None:
            return self.recorded(x_BLD, k)

        def guide(block: int, x_RLD: Tensor) -> Tensor:
            if block not in self.inner:
                return x_RLD
            with_condition, without = x_RLD.chunk(2)
            return self.settings.mixed(with_condition, without, k, len(self.sides)).repeat(2, 1, 1)

        of = guide if self.inner else None
        return self.network.run(x_BLD, self.condition, self.sides, k, self.memory, guide=of, turns=self.turns)

    def close(self) -> None:
        """Leave the graphs to other runs."""
        recorded, self.recorded = self.recorded, None
        if recorded is not None:
            recorded.close()

    def keep(self, rows: Sequence[int]) -> None:
        if self.recorded is not None:  # fewer rows are another shape
            self.condition, self.memory = self.recorded.leave(self.done)
            self.close()
        c, which = self.condition, list(rows)
        text, mask = (None if part is None else part[which] for part in (c.text_BTD, c.mask_BT))
        self.condition = Condition(c.vector_BD[which], text, mask)
        for layer in self.memory:
            layer.keep(which)


class ScaleCanvas:
    """See `bitdance.loop.Canvas`: one scale after the other, each added to the sum that the decoder reads."""

    def __init__(
        self,
        network: NextScaleNetwork,
        quantizer: ScaleQuantizer,
        sides: Sequence[Side],
        settings: NextScaleSettings,
        exponential: Exponential,
        count: int,
        given: Given | None = None,
    ) -> None:
        self.config, self.quantizer, self.sides, self.settings = network.config, quantizer, list(sides), settings
        self._exponential, self._given, self.count, self.blocks = exponential, given, count, len(self.sides)
        self.scales: list[Tensor] = []
        self.total = torch.zeros(())
        self.logits: list[Tensor] = []  # of every scale, for who asks (`remember`)
        self.remember = False

    def sample(self, ahead_R: Tensor, m: int, pictures: Sequence[int]) -> Tensor:
        """Logits (R,l,outputs) → the sum so far, shrunk to the next scale (B,Z,h,w)."""
        K, (h, w), device = self.blocks, self.sides[m], ahead_R.device
        B, codes = len(pictures), self.config.tokens == "codes"
        logits = ahead_R
        tau = self.settings.tau_at(m, K)
        if not codes:
            logits = logits.unflatten(-1, (self.config.latents, 2))
        logits = logits / tau if tau != 1 else logits
        if len(logits) > B:
            with_condition, without = logits.chunk(2)
            logits = self.settings.mixed(with_condition, without, m, K) if 0 in self.settings.insertion else with_condition
        if self.remember:
            self.logits.append(logits)
        likely = filtered(logits, self.settings.top_k, self.settings.top_p)
        values = draw(likely, self._exponential(pictures, tuple(likely.shape[1:])).to(device))
        tokens = values.view(B, h, w) if codes else (values.view(B, h, w, -1).permute(0, 3, 1, 2).float() * 2 - 1)
        code = self.quantizer.code(tokens)
        if self.settings.more_smooth and codes:
            assert isinstance(self.quantizer, ScaleCodes)
            factor, heat = smoothing(m, K)
            share = softened(likely * factor, self._exponential(pictures, tuple(likely.shape[1:])).to(device), heat)
            code = (share @ self.quantizer.embedding.weight.float()).unflatten(1, (h, w)).permute(0, 3, 1, 2)
        if self._given is not None:
            kept = self._given.keep[m][list(pictures)].to(device)
            own = self._given.tokens[m][list(pictures)].to(device)
            tokens = torch.where(kept if codes else kept[:, None], own, tokens)
            code = torch.where(kept[:, None] if codes else self._wide(kept), self.quantizer.code(own), code)
        return self._add(tokens, code, m, pictures)

    def _wide(self, kept_Bhw: Tensor) -> Tensor:
        """Which positions of the latents belong to kept tokens (B,1,·,·)."""
        wide = kept_Bhw[:, None]
        return wide.repeat_interleave(2, 2).repeat_interleave(2, 3) if getattr(self.quantizer, "patchify", False) else wide

    def _add(self, tokens: Tensor, code: Tensor, m: int, pictures: Sequence[int]) -> Tensor:
        full = self.quantizer.full(self.sides)
        enlarged = self.quantizer.enlarged(code, m, self.blocks, full)
        if m == 0:
            self.total = enlarged.new_zeros(self.count, *enlarged.shape[1:])
        self.scales.append(tokens.new_zeros(self.count, *tokens.shape[1:]))
        self.scales[m][list(pictures)] = tokens
        self.total[list(pictures)] += enlarged
        if m + 1 == self.blocks:
            return enlarged
        return self.quantizer.input(self.total[list(pictures)], self.sides[m + 1])

    def tokens(self) -> list[Tensor]:
        """Tokens of the scales so far."""
        return self.scales
