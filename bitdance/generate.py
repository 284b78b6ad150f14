"""Prompts → bits, by the autoregressive loop (`bitdance.loop`).

B pictures, R rows of the backbone (B conditional, then with guidance B unconditional), P tokens per block, C bits per token,
D hidden size, L sequence. Source: BitDance paper (arXiv 2602.14041), next-patch diffusion; published checkpoints for
token order and positions.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import Noise
from bitdance.heads.diffusion.settings import Sampling
from bitdance.loop import OnBlock, predict
from bitdance.model import BitDanceModel
from bitdance.networks.offload import Phase
from bitdance.sequence.mask import dense_mask
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import conditional_ids, unconditional_ids, vision_prefix_ids


def generate_bits(
    model: BitDanceModel,
    prompts: Sequence[str],
    h: int,
    w: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    on_block: OnBlock | None = None,
    noise: Noise | None = None,
    block_sampler: BlockSampler | None = None,
    enter: Callable[[Phase], None] = lambda phase: None,
    cancelled: Collection[int] = (),
) -> Tensor:
    """One picture per prompt → bits (B,C,h,w) in {-1,+1}, float32, on the model's device; see `bitdance.loop.predict`.

    `noise` replaces the draws of the generators by given ones of shape (B,P,C). `block_sampler`, kept from call to call, is what
    is compiled only once. `enter(phase)` comes before the prompt and before the loop and may move weights
    (`bitdance.networks.offload`). ValueError for an unnamed grid or a count of generators that is not the count of prompts.
    """
    if len(generators) != len(prompts) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(generators)} generators; give one generator per prompt")
    plan, sample = PatchPlan(h, w, model.patch_side), block_sampler or BlockSampler(model.head)
    predictor = _Predictor(model, prompts, plan, sampling.guided, enter)
    blocks = [(sampling, steps) for steps in sampling.block_steps(plan.num_blocks)]
    given = None if noise is None else (lambda rows: noise())
    return predict(predictor, sample, plan, blocks, model.head.config.ch_target, generators, on_block, given, cancelled)


class _Predictor:
    """See `bitdance.loop.Predictor`. Prompts of unequal length are padded on the left."""

    def __init__(
        self, model: BitDanceModel, prompts: Sequence[str], plan: PatchPlan, guided: bool, enter: Callable[[Phase], None]
    ) -> None:
        prefix = vision_prefix_ids(model.special, plan.h, plan.w, plan.block_size)
        texts = [conditional_ids(model.text_tokenizer, prompt) for prompt in prompts]
        if guided:
            texts += [unconditional_ids(model.text_tokenizer)] * len(prompts)
        self.model, self.plan, self.enter = model, plan, enter
        self.ids = [[*text, *prefix] for text in texts]

    def begin(self) -> Tensor:
        """Prefix and block 0 in one call: text, <|vision_start|>, <|res_h|> causal; <|res_w|> and queries see each other."""
        self.enter("prompt")
        backbone, plan = self.model.backbone, self.plan
        self.rows = rows = _Rows(self.ids, plan.block_size, backbone.device)
        self.cache = backbone.new_cache(rows.length + (plan.num_blocks - 1) * plan.block_size)
        hidden_RLD = backbone(backbone.embed(rows.ids_RL), rows.position_RL, rows.prefix_mask(), self.cache)
        row_N, col_N = plan.coordinates(hidden_RLD.device)
        place_ND = sincos_2d(row_N, col_N, hidden_RLD.shape[-1], side=max(plan.h, plan.w)).to(hidden_RLD)
        self.place_MPD = place_ND.unflatten(0, (plan.num_blocks, plan.block_size))
        self.enter("loop")
        return hidden_RLD[:, -plan.block_size :] + self.place_MPD[0]

    def extend(self, bits_KPC: Tensor, m: int) -> Tensor:
        place_PD, rows = self.place_MPD[m], self.rows
        inputs_KPD = self.model.projector(bits_KPC).to(place_PD) + place_PD
        inputs_RPD = inputs_KPD.repeat(len(rows.padding) // len(bits_KPC), 1, 1)
        position_RP, cache = rows.block_position(m), self.cache
        hidden_RPD = self.model.backbone(inputs_RPD, position_RP, cache=cache, causal=False, padding=rows.padding)
        return hidden_RPD + self.place_MPD[m + 1]

    def keep(self, rows: Sequence[int]) -> None:
        self.rows.keep(rows)
        self.cache.keep(rows)


def padded_length(tokens: int) -> int:
    """The length of a batch's prefixes, the longest of which has so many tokens: few lengths, since some libraries keep a
    kernel for each."""
    return -(-tokens // 16) * 16


class _Rows:
    """Sequences of unequal length in one batch: padded on the left, positions counted without padding."""

    def __init__(self, ids: list[list[int]], P: int, device: torch.device) -> None:
        self.P, self.length = P, padded_length(max(map(len, ids)))
        self.padding = [self.length - len(row) for row in ids]
        self.ids_RL = torch.tensor([[0] * n + row for n, row in zip(self.padding, ids)], device=device)
        self.padding_R1 = torch.tensor(self.padding, device=device)[:, None]
        self.place_L = torch.arange(self.length, device=device)
        self.position_RL = (self.place_L - self.padding_R1).clamp(min=0)

    def prefix_mask(self) -> Tensor:
        """(R,1,L,L): causal, but block 0, the last P tokens, sees all of itself; padding is seen by nobody else."""
        doc_RL = torch.where(self.place_L >= self.padding_R1, 0, -1)
        block_RL = torch.where(self.place_L >= self.length - self.P, 0, -1).expand_as(doc_RL)
        return dense_mask(doc_RL, block_RL)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.padding = [self.padding[row] for row in rows]
        self.padding_R1 = self.padding_R1[list(rows)]

    def block_position(self, m: int) -> Tensor:
        """(R,P): where the tokens of picture block m stand in their own row."""
        start = self.length + m * self.P
        return torch.arange(start, start + self.P, device=self.place_L.device) - self.padding_R1
