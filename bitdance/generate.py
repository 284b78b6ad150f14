"""The one autoregressive loop: prompts → bits, one block of P tokens per step.

Letters: B pictures, R rows of the backbone (B conditional, then with guidance B unconditional), P tokens per block, M
blocks, C bits per token, D hidden size, L sequence. Source: BitDance paper (arXiv 2602.14041), next-patch diffusion;
published checkpoints for token order, positions and the order of random draws.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bitdance.mask import dense_mask
from bitdance.model import BitDanceModel
from bitdance.patches import PatchPlan
from bitdance.positions import sincos_2d
from bitdance.prompt import conditional_ids, unconditional_ids, vision_prefix_ids
from bitdance.sampler import SAMPLERS, Noise
from lfq_tokenizer import binarize

OnBlock = Callable[[int, int, Tensor], None]


@torch.no_grad()
def generate_bits(
    model: BitDanceModel,
    prompts: Sequence[str],
    h: int,
    w: int,
    steps: int,
    guidance: float,
    generators: Sequence[torch.Generator],
    sampler: str = "euler_maruyama",
    on_block: OnBlock | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """One picture per prompt → bits (B,C,h,w) in {-1,+1}, float32, on the model's device.

    `steps` solver steps per block; `guidance` <= 1 leaves the unconditional branch out. Picture i draws from
    `generators[i]` alone: per block the initial noise (1,P,C), then one draw (1,P,C) per stochastic step, so it does
    not depend on its neighbours. `noise` replaces these draws by given ones of shape (B,P,C). `on_block(done, M,
    bits_BChw)` is called after each block, unfinished positions being 0; what it raises ends the run. The backbone is
    called M times. ValueError for an unknown sampler, an unnamed grid or a count of generators that is not the count of
    prompts.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler = {sampler!r}; allowed are {', '.join(SAMPLERS)}")
    if len(generators) != len(prompts) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(generators)} generators; give one generator per prompt")
    plan, backbone, head = PatchPlan(h, w, model.patch_side), model.backbone, model.head
    B, P, M = len(prompts), plan.block_size, plan.num_blocks
    solve, guided = SAMPLERS[sampler], guidance > 1
    prefix = vision_prefix_ids(model.special, h, w, P)
    texts = [conditional_ids(model.text_tokenizer, prompt) for prompt in prompts]
    if guided:
        texts += [unconditional_ids(model.text_tokenizer)] * B
    rows = _Rows([[*text, *prefix] for text in texts], P, next(backbone.parameters()).device)

    # Prefix and block 0 in one call: text, <|vision_start|>, <|res_h|> causal; <|res_w|> and queries see each other.
    cache = backbone.new_cache()
    hidden_RPD = backbone(backbone.embed(rows.ids_RL), rows.position_RL, rows.prefix_mask(), cache)[:, -P:]
    row_N, col_N = plan.coordinates(hidden_RPD.device)
    place_MPD = sincos_2d(row_N, col_N, hidden_RPD.shape[-1]).to(hidden_RPD).unflatten(0, (M, P))
    C = head.config.ch_target
    tokens_BNC = torch.zeros(B, h * w, C, device=hidden_RPD.device)
    noise = noise or _own_noise(generators, P, C, hidden_RPD.device)
    for m in range(M):
        denoise = partial(head.denoise, embedded_KPW=head.prepare(hidden_RPD + place_MPD[m]))
        predicted_BPC = solve(denoise, noise(), steps, noise, guidance, head.config.time_shift)
        bits_BPC = binarize(predicted_BPC)
        tokens_BNC[:, m * P : (m + 1) * P] = bits_BPC
        if m < M - 1:  # the last block predicts nothing
            inputs_BPD = model.projector(bits_BPC).to(hidden_RPD) + place_MPD[m]
            inputs_RPD = inputs_BPD.repeat(2, 1, 1) if guided else inputs_BPD
            hidden_RPD = backbone(inputs_RPD, rows.block_position(m), rows.block_mask(m), cache, causal=False)
        if on_block is not None:
            on_block(m + 1, M, plan.unorder(tokens_BNC))
    return plan.unorder(tokens_BNC)


class _Rows:
    """Sequences of unequal length in one batch: padded on the left, positions counted without padding."""

    def __init__(self, ids: list[list[int]], P: int, device: torch.device) -> None:
        self.P, self.length = P, max(map(len, ids))
        padding = [self.length - len(row) for row in ids]
        self.padded = any(padding)
        self.ids_RL = torch.tensor([[0] * n + row for n, row in zip(padding, ids)], device=device)
        self.padding_R1 = torch.tensor(padding, device=device)[:, None]
        self.place_L = torch.arange(self.length, device=device)
        self.position_RL = (self.place_L - self.padding_R1).clamp(min=0)

    def prefix_mask(self) -> Tensor:
        """(R,1,L,L): causal, but block 0, the last P tokens, sees all of itself; padding is seen by nobody else."""
        doc_RL = torch.where(self.place_L >= self.padding_R1, 0, -1)
        block_RL = torch.where(self.place_L >= self.length - self.P, 0, -1).expand_as(doc_RL)
        return dense_mask(doc_RL, block_RL)

    def block_position(self, m: int) -> Tensor:
        """(R,P): where the tokens of picture block m stand in their own row."""
        start = self.length + m * self.P
        return torch.arange(start, start + self.P, device=self.place_L.device) - self.padding_R1

    def block_mask(self, m: int) -> Tensor | None:
        """(R,1,P,L): a picture block sees everything before it and itself. None when there is no padding to hide."""
        if not self.padded:
            return None
        keys = torch.arange(self.length + (m + 1) * self.P, device=self.place_L.device)
        return (keys >= self.padding_R1)[:, None, None].expand(-1, -1, self.P, -1)


def _own_noise(generators: Sequence[torch.Generator], P: int, C: int, device: torch.device) -> Noise:
    """The next standard normal draw (B,P,C), float32, each picture from its own generator."""

    def draw() -> Tensor:
        draws = [torch.randn((1, P, C), generator=g, device=g.device) for g in generators]
        if device.type == "cuda" and all(not d.is_cuda for d in draws):
            return torch.cat(draws).pin_memory().to(device, non_blocking=True)
        return torch.cat([d.to(device) for d in draws])

    return draw
