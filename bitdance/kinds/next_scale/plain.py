"""The yardstick: the published procedure of VAR and Infinity, written down as plainly as it is described, and left alone.

Both branches of guidance go through the network in one call, as published. Each scale makes the modulation of every block, the
keys and values of the prompt and the rotary positions anew; keys and values of the picture are kept by joining tensors. It must
run on a network whose linear layers are torch's own.

B pictures, R rows, l tokens of a scale, D hidden size. Sources: public codes of VAR and Infinity for the order of operations.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdance.kinds.next_scale.generate import Exponential
from bitdance.kinds.next_scale.network import MOST, NORM_EPS, Block, Condition, NextScaleNetwork
from bitdance.kinds.next_scale.positions import scale_turns
from bitdance.kinds.next_scale.settings import NextScaleSettings
from bitdance.networks.rotary import rotate
from lfq_tokenizer.scales import ScaleQuantizer, Side

Past = list[tuple[Tensor, Tensor] | None]


@torch.no_grad()
def generate_plain(
    network: NextScaleNetwork,
    quantizer: ScaleQuantizer,
    condition: Condition,
    sides: Sequence[Side],
    settings: NextScaleSettings,
    exponential: Exponential,
    count: int,
) -> list[Tensor]:
    """Tokens of every scale, those of `generate_tokens` up to rounding; guidance on the logits, all values drawn from."""
    c, found = network.config, list[Tensor]()
    past: Past = [None] * c.depth
    total: Tensor | float = 0.0
    x = condition.vector_BD[:, None] + network.pos_start
    for k, (h, w) in enumerate(sides):
        before = sum(a * b for a, b in sides[:k])
        level = network.lvl_embed.weight[k]
        x = x + (level if c.rotary else level + network.pos_1LC[:, before : before + h * w])
        turns = scale_turns(sides, c.head_width)[before : before + h * w] if c.rotary else None
        logits = _logits(network, x, condition, turns, past)
        if c.tokens == "bits":
            logits = logits.unflatten(-1, (c.latents, 2))
        logits = logits / settings.tau
        if settings.guided:
            with_condition, without = logits.chunk(2)
            logits = settings.mixed(with_condition, without, k, len(sides))
        drawn = (logits.softmax(-1) / exponential(range(count), tuple(logits.shape[1:]))).argmax(-1)
        tokens = drawn.view(count, h, w) if c.tokens == "codes" else 2.0 * drawn.view(count, h, w, -1).permute(0, 3, 1, 2) - 1
        found.append(tokens)
        total = total + quantizer.enlarged(quantizer.code(tokens), k, len(sides), quantizer.full(sides))
        if k + 1 < len(sides):
            read = quantizer.input(total, sides[k + 1]).flatten(2).transpose(1, 2)
            x = network.word_embed(read).repeat(len(condition.vector_BD) // count, 1, 1)
    return found


def _logits(network: NextScaleNetwork, x: Tensor, condition: Condition, turns: Tensor | None, past: Past) -> Tensor:
    shared = network.shared_ada_lin(condition.vector_BD) if network.config.shared_ada else None
    for i, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        own = block.ada_lin(condition.vector_BD) if shared is None else shared + block.ada_gss.flatten()
        gate1, gate2, scale1, scale2, shift1, shift2 = own[:, None].chunk(6, dim=-1)
        y = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale1) + shift1
        attn, bias = block.attn, torch.cat([block.attn.q_bias, torch.zeros_like(block.attn.q_bias), block.attn.v_bias])
        q, k, v = _heads(F.linear(y, attn.mat_qkv.weight, bias), 3, attn.heads)
        q = F.normalize(q, dim=-1) * attn.scale_mul.clamp(max=MOST).exp()
        k = F.normalize(k, dim=-1)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        if (earlier := past[i]) is not None:
            k, v = torch.cat([earlier[0], k], dim=2), torch.cat([earlier[1], v], dim=2)
        past[i] = k, v
        x = x + gate1 * attn.proj(_attended(q, k, v, None, 1.0))
        if condition.text_BTD is not None:
            cross = block.cross
            bias = torch.cat([torch.zeros_like(cross.v_bias), cross.v_bias])
            (q,) = _heads(cross.mat_q(block.ca_norm(x)), 1, cross.heads)
            k, v = _heads(F.linear(condition.text_BTD, cross.mat_kv.weight, bias), 2, cross.heads)
            x = x + cross.proj(_attended(q, k, v, condition.mask_BT, 1 / math.sqrt(q.shape[-1])))
        y = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale2) + shift2
        x = x + gate2 * block.ffn.fc2(F.gelu(block.ffn.fc1(y), approximate="tanh"))
    scale, shift = network.head_nm.ada_lin(condition.vector_BD)[:, None].chunk(2, dim=-1)
    return network.head(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift)


def _heads(x: Tensor, parts: int, heads: int) -> Sequence[Tensor]:
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask_BT: Tensor | None, scale: float) -> Tensor:
    mask = None if mask_BT is None else mask_BT[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)
