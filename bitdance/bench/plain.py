"""The yardstick: the published procedure, written down as plainly as it is described, and left alone ever after.

Two calls of the language model a step, one for each branch of guidance, prefix and block 0 apart, with a cache that grows and a
mask of ones that is made anew; every evaluation of the head embeds condition and times again, for both branches; the last
block's bits go through the language model though nothing follows. It must run on a model whose linear layers are torch's
own (`random_model` or `load_model`, not yet in a pipeline).

B pictures, P tokens per block, C bits, D hidden size, W width of the head. Source: BitDance paper (arXiv 2602.14041); published
checkpoints.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from bitdance.heads.diffusion.network import HEAD_DIM, NORM_EPS, Block, HeadNet
from bitdance.model import BitDanceModel
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import conditional_ids, unconditional_ids, vision_prefix_ids

MANUAL_ATTENTION = 32  # up to so many tokens the head multiplies queries and keys itself


@torch.no_grad()
def generate_plain(
    model: BitDanceModel, prompt: str, h: int, w: int, steps: int, guidance: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """One picture of `prompt` for each generator → bits (B,C,h,w), those of `generate_bits` up to rounding."""
    plan, backbone = PatchPlan(h, w, model.patch_side), model.backbone
    B, P, C, device = len(generators), plan.block_size, model.head.config.ch_target, backbone.device
    texts = [conditional_ids(model.text_tokenizer, prompt)]
    if guidance > 1:
        texts.append(unconditional_ids(model.text_tokenizer))
    prefix = vision_prefix_ids(model.special, h, w, P)
    caches = [DynamicCache(config=backbone.lm.config) for _ in texts]
    row_N, col_N = plan.coordinates(device)
    place_ND = sincos_2d(row_N, col_N, backbone.hidden_size, side=max(h, w)).to(backbone.dtype)

    def step(inputs_BLD: Tensor, cache: DynamicCache) -> Tensor:
        length = cache.get_seq_length() + P
        ones = torch.ones(B, 1, P, length, dtype=torch.bool, device=device)
        return backbone(inputs_BLD, torch.arange(length - P, length, device=device)[None], ones, cache)

    hidden = []
    for text, cache in zip(texts, caches):
        ids = torch.tensor([text + prefix] * B, device=device)
        backbone(backbone.embed(ids[:, :-P]), cache=cache)
        hidden.append(step(backbone.embed(ids[:, -P:]), cache))
    blocks = []
    for m in range(plan.num_blocks):
        place_PD = place_ND[m * P : (m + 1) * P]
        condition = torch.cat(hidden) + place_PD
        x_BPC = _sample(model, condition, steps, guidance, generators, (P, C))
        bits = torch.sign(torch.cat([x_BPC] * len(texts)))
        blocks.append(bits[:B])
        inputs = model.projector(bits).to(condition) + place_PD
        hidden = [step(branch, cache) for branch, cache in zip(inputs.chunk(len(texts)), caches)]
    return plan.unorder(torch.cat(blocks, dim=1).float())


def _sample(
    model: BitDanceModel,
    condition: Tensor,
    steps: int,
    guidance: float,
    generators: Sequence[torch.Generator],
    shape: tuple[int, int],
) -> Tensor:
    """Euler–Maruyama: `steps` of them with noise, then one of 0.05 without."""

    def noise() -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=g, device=g.device) for g in generators]).to(condition.device)

    def velocity(x: Tensor, t: float) -> Tensor:
        rows = torch.cat([x] * (len(condition) // len(x)))
        times = torch.full((len(rows),), t, device=x.device)
        v = (_head(model.head.net, rows, times, condition) - rows) / max(1 - t, 0.05)
        if guidance <= 1:
            return v
        v_cond, v_uncond = v.chunk(2)
        return v_uncond + guidance * (v_cond - v_uncond)

    shift, grid = model.head.config.time_shift, [0.95 * i / steps for i in range(steps + 1)]
    grid = [t / (t + shift * (1 - t)) for t in grid]
    x = noise()
    for t, t_next in pairwise(grid):
        dt = t_next - t
        v = velocity(x, t)
        score = (t * v - x) / (1 - t)
        x = x + (v + (1 - t) * score) * dt + math.sqrt(2 * (1 - t) * dt) * noise()
    return x + 0.05 * velocity(x, 0.95)


def _head(net: HeadNet, x: Tensor, t_K: Tensor, condition: Tensor) -> Tensor:
    """Noisy bits (K,P,C), times (K,), conditions (K,P,D) → predicted bits (K,P,C)."""
    y = F.silu(net.time_embed(t_K)[:, None] + net.cond_embed(condition))
    x = net.input_proj(x.to(y.dtype))
    for i, block in enumerate(net.res_blocks):
        if i % net.blocks_per_modulation == 0:
            scale1, shift1, gate1, scale2, shift2, gate2 = net.ada_ln_blocks[i // net.blocks_per_modulation](y).chunk(6, -1)
        x = x + gate1 * _attention(block, block.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * _feed_forward(block, block.norm2(x) * (1 + scale2) + shift2)
    scale, shift = net.final_layer.ada_ln_modulation(y).chunk(2, -1)
    x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
    return 2 * torch.sigmoid(net.final_layer.linear(x).float()) - 1


def _attention(block: Block, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in block.attn.wqkv(x).chunk(3, -1))
    if x.shape[1] > MANUAL_ATTENTION:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1) @ v
    return block.attn.wo(out.transpose(1, 2).flatten(2))


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    if not block.use_swiglu:
        return block.mlp(x)
    gate, value = block.w1(x).chunk(2, -1)
    return block.w2(F.silu(gate) * value)
