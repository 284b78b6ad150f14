"""The one autoregressive loop: prompts → bits, one block of P tokens per step.

Letters: B pictures, R rows of the backbone (B conditional, then with guidance B unconditional), P tokens per block, M
blocks, C bits per token, D hidden size, L sequence. Source: BitDance paper (arXiv 2602.14041), next-patch diffusion;
published checkpoints for token order, positions and the order of random draws.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import Noise, draws
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.networks.offload import Phase
from bitdance.sequence.mask import dense_mask
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import conditional_ids, unconditional_ids, vision_prefix_ids
from lfq_tokenizer.binary import binarize_unchecked, check_lost

OnBlock = Callable[[int, int, Tensor], None]


@torch.no_grad()
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
) -> Tensor:
    """One picture per prompt → bits (B,C,h,w) in {-1,+1}, float32, on the model's device.

    Picture i draws from `generators[i]` alone: per block the initial noise (1,P,C), then one draw (1,P,C) per
    stochastic step, so it does not depend on its neighbours. `noise` replaces these draws by given ones of shape
    (B,P,C). `on_block(done, M, bits_BChw)` is called after each block, unfinished positions being 0; what it raises ends
    the run. The backbone is called M times. `block_sampler`, kept from call to call, is what is compiled only once.
    `enter(phase)` comes before the prompt and before the loop and may move weights (`bitdance.networks.offload`).
    ValueError for an unnamed grid or a count of generators that is not the count of prompts.
    """
    if len(generators) != len(prompts) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(generators)} generators; give one generator per prompt")
    plan, backbone = PatchPlan(h, w, model.patch_side), model.backbone
    B, P, M, C = len(prompts), plan.block_size, plan.num_blocks, model.head.config.ch_target
    sample = block_sampler or BlockSampler(model.head)
    prefix = vision_prefix_ids(model.special, h, w, P)
    texts = [conditional_ids(model.text_tokenizer, prompt) for prompt in prompts]
    if sampling.guided:
        texts += [unconditional_ids(model.text_tokenizer)] * B
    enter("prompt")
    rows = _Rows([[*text, *prefix] for text in texts], P, backbone.device)

    # Prefix and block 0 in one call: text, <|vision_start|>, <|res_h|> causal; <|res_w|> and queries see each other.
    cache = backbone.new_cache(rows.length + (M - 1) * P)
    hidden_RPD = backbone(backbone.embed(rows.ids_RL), rows.position_RL, rows.prefix_mask(), cache)[:, -P:]
    row_N, col_N = plan.coordinates(hidden_RPD.device)
    place_MPD = sincos_2d(row_N, col_N, hidden_RPD.shape[-1], side=max(h, w)).to(hidden_RPD).unflatten(0, (M, P))
    tokens_BNC = torch.zeros(B, h * w, C, device=hidden_RPD.device)
    lost = tokens_BNC.new_zeros((), dtype=torch.long)
    noise = noise or _own_noise(generators, P, C)
    enter("loop")
    for m, steps in enumerate(sampling.block_steps(M)):
        noise_SBPC = _to(torch.stack([noise() for _ in range(draws(sampling.sampler, steps))]), hidden_RPD.device)
        bits_BPC, nans = binarize_unchecked(sample(hidden_RPD + place_MPD[m], noise_SBPC, sampling, steps))
        lost = lost + nans  # read at the end: until then nothing waits for the device
        tokens_BNC[:, m * P : (m + 1) * P] = bits_BPC
        if m < M - 1:  # the last block predicts nothing
            inputs_BPD = model.projector(bits_BPC).to(hidden_RPD) + place_MPD[m]
            inputs_RPD = inputs_BPD.repeat(2, 1, 1) if sampling.guided else inputs_BPD
            hidden_RPD = backbone(inputs_RPD, rows.block_position(m), cache=cache, causal=False, padding=rows.padding)
        if on_block is not None:
            on_block(m + 1, M, plan.unorder(tokens_BNC))
    check_lost(lost, tokens_BNC.numel())
    return plan.unorder(tokens_BNC)


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

    def block_position(self, m: int) -> Tensor:
        """(R,P): where the tokens of picture block m stand in their own row."""
        start = self.length + m * self.P
        return torch.arange(start, start + self.P, device=self.place_L.device) - self.padding_R1


def _own_noise(generators: Sequence[torch.Generator], P: int, C: int) -> Noise:
    """The next standard normal draw (B,P,C), float32, each picture from its own generator; on its device if they share one."""
    together = len({g.device for g in generators}) == 1

    def draw() -> Tensor:
        draws = [torch.randn((1, P, C), generator=g, device=g.device) for g in generators]
        return torch.cat(draws if together else [d.cpu() for d in draws])

    return draw


def _to(noise: Tensor, device: torch.device) -> Tensor:
    """All draws of a block in one transfer, for which nothing waits."""
    if device.type == "cuda" and not noise.is_cuda:
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)
