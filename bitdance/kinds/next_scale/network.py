"""The transformer of next-scale models: a condition and the picture so far → logits of every token of the next scale.

Scale 0 reads the condition, scale k the sum of the scales before it, shrunk to its size. A token sees its own and all earlier
scales. Norms are modulated by the condition; queries and keys have length 1, times a learned factor per head.

B rows, L tokens of all scales, l of one, Z numbers of a token's input, D hidden size, H heads, E width of a head, T text tokens.
Sources: VAR paper (arXiv 2404.02905), Infinity paper (arXiv 2412.04431); public codes, whose parameter names these are but for
`attn`, `cross` and flat block numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitdance.heads.attend import attend
from bitdance.kinds.next_scale.config import NextScaleConfig
from bitdance.kinds.next_scale.positions import scale_turns
from bitdance.networks.kernels import linear
from bitdance.networks.memory import Memory
from bitdance.networks.rotary import rotate
from lfq_tokenizer.scales import Side

NORM_EPS = 1e-6
MOST = math.log(100)  # of the logarithm of a head's factor


@dataclass(frozen=True)
class Condition:
    """What a batch is made of, as the blocks read it: `vector_BD` moves the norms and starts scale 0; of prompts, `text_BTD`
    is what cross-attention reads, `mask_BT` False at padding (None: there is none)."""

    vector_BD: Tensor
    text_BTD: Tensor | None = None
    mask_BT: Tensor | None = None


class NextScaleNetwork(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: NextScaleConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        if c.text_width is None:
            self.class_emb = nn.Embedding(c.num_classes + 1, c.width)
        else:
            self.cfg_uncond = nn.Parameter(torch.zeros(c.text_tokens, c.text_width))
            self.text_norm = nn.RMSNorm(c.text_width, eps=NORM_EPS)
            self.text_pool = Pool(c.text_width, c.width)
            self.text_proj = nn.Sequential(
                nn.Linear(c.text_width, c.width), nn.GELU(approximate="tanh"), nn.Linear(c.width, c.width)
            )
        self.pos_start = nn.Parameter(torch.zeros(1, 1, c.width))
        self.lvl_embed = nn.Embedding(c.level_count, c.width)
        self.word_embed = nn.Linear(c.latents, c.width)
        if not c.rotary:
            self.pos_1LC = nn.Parameter(torch.zeros(1, c.length, c.width))
        if c.shared_ada:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.head_nm = HeadNorm(c.width)
        self.head = nn.Linear(c.width, c.outputs)
        self.initialise(generator)
        self.checkpoint_layers = False  # in training, keep a block's input alone and compute the rest again in the backward pass

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Weights that have learned nothing, as published: gates begin almost shut, so that a deep network begins as a shallow
        one."""
        c = self.config
        std, rest = (3 * c.width) ** -0.5, 0.5 if c.text_width is None else 1e-3
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        self.pos_start.normal_(std=std, generator=generator)
        if not c.rotary:
            self.pos_1LC.normal_(std=std, generator=generator)
        if c.text_width is not None:
            self.text_pool.mat_q.normal_(std=std, generator=generator)
            edge = math.erf(2 / 1.2 / math.sqrt(2))  # normal of deviation 1.2, nothing beyond ±2
            self.cfg_uncond.uniform_(-edge, edge, generator=generator).erfinv_().mul_(1.2 * math.sqrt(2 / c.text_width))
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[1].weight.mul_(rest)
        for block in self.blocks:
            last = [block.attn.proj, block.ffn.fc2] + ([block.cross.proj] if c.text_width is not None else [])
            for layer in last:
                layer.weight.div_(math.sqrt(2 * c.depth))
            if c.shared_ada:
                block.ada_gss.normal_(std=c.width**-0.5, generator=generator)
            parts = block.ada_gss[0, 0] if c.shared_ada else block.ada_lin[1].weight.unflatten(0, (6, -1))
            parts[:2].mul_(c.gate)
            parts[2:].mul_(rest)

    @property
    def null_class(self) -> int:
        """The class that stands for none: one beyond the others."""
        return self.config.num_classes

    def of_classes(self, class_B: Tensor) -> Condition:
        """Class numbers (B,), the null class among them, → what the blocks read."""
        return Condition(self.class_emb(class_B))

    def of_text(self, features: Sequence[Tensor]) -> Condition:
        """Features (T,C) of each prompt → what the blocks read."""
        normed = [self.text_norm(one.to(self.text_norm.weight.dtype)) for one in features]
        padded_BTC = nn.utils.rnn.pad_sequence(normed, batch_first=True)
        lengths, T = [len(one) for one in normed], padded_BTC.shape[1]
        mask_BT = None
        if any(length < T for length in lengths):
            mask_BT = torch.arange(T, device=padded_BTC.device) < torch.tensor(lengths, device=padded_BTC.device)[:, None]
        return Condition(self.text_pool(padded_BTC, mask_BT), self.text_proj(padded_BTC), mask_BT)

    def start(self, condition: Condition) -> Tensor:
        """The input of scale 0 (B,1,D)."""
        return condition.vector_BD[:, None] + self.pos_start + self._level(0, 1, 0)

    def embed(self, input_BZhw: Tensor, k: int, before: int) -> Tensor:
        """The picture so far, shrunk to scale k, → its input (B,l,D); `before` tokens of earlier scales."""
        x = self.word_embed(input_BZhw.to(self.word_embed.weight.dtype).flatten(2).transpose(1, 2))
        return x + self._level(k, x.shape[1], before)

    def _level(self, k: int, length: int, before: int) -> Tensor:
        level = self.lvl_embed.weight[k]
        return level if self.config.rotary else level + self.pos_1LC[:, before : before + length]

    def run(
        self,
        x_BLD: Tensor,
        condition: Condition,
        sides: Sequence[Side],
        first: int,
        memory: list[Memory] | None = None,
        mask: Tensor | None = None,
        kept: Tensor | None = None,
        guide: Callable[[int, Tensor], Tensor] | None = None,
        turns: Tensor | None = None,
    ) -> Tensor:
        """Inputs of the scales from `first` on → logits (B,L,outputs), float32.

        `memory` holds the scales before and gets these; `mask` bool (L,L) for several scales at once. `kept` (blocks, 2, B), 0 or
        1 / share: which branches of which pictures a training step keeps. `guide(block, x)` changes what a block gives. `turns`:
        those of all scales, for who has them.
        """
        turns = self.turns(sides) if turns is None else turns
        if turns is not None:
            start = sum(h * w for h, w in sides[:first])
            turns = turns[start : start + x_BLD.shape[1]]
        ada = self.shared_ada_lin(condition.vector_BD).unflatten(-1, (6, -1)) if self.config.shared_ada else None
        for i, block in enumerate(self.blocks):
            own = (condition, ada, turns, mask, None if memory is None else memory[i], None if kept is None else kept[i])
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, *own, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, *own)
            x_BLD = x_BLD if guide is None else guide(i, x_BLD)
        x_BLD = self.head_nm(x_BLD, condition.vector_BD)
        with torch.autocast(x_BLD.device.type, enabled=False):
            if self.head.weight.dtype == torch.float32:
                return self.head(x_BLD.float())
            return F.linear(x_BLD.float(), self.head.weight.float(), self.head.bias.float())

    def forward(
        self, inputs: Sequence[Tensor], condition: Condition, sides: Sequence[Side], kept: Tensor | None = None
    ) -> Tensor:
        """All scales at once, as in training: `inputs` (B,Z,h_k,w_k) of the scales after the first → logits (B,L,outputs)."""
        parts, before = [self.start(condition)], 1
        for k, one in enumerate(inputs, 1):
            parts.append(self.embed(one, k, before))
            before += parts[-1].shape[1]
        return self.run(
            torch.cat(parts, dim=1), condition, sides, 0, mask=scale_mask(sides[: len(parts)]).to(parts[0].device), kept=kept
        )

    def turns(self, sides: Sequence[Side]) -> Tensor | None:
        """Rotary positions of the tokens of all scales (L,E/2,2), on the network's device; None where positions are learned."""
        return scale_turns(sides, self.config.head_width).to(self.pos_start.device) if self.config.rotary else None

    def new_memory(self, sides: Sequence[Side]) -> list[Memory]:
        """Room for the keys and values of one batch of pictures."""
        capacity = sum(h * w for h, w in sides)
        return [Memory(capacity) for _ in self.blocks]


def scale_mask(sides: Sequence[Side]) -> Tensor:
    """Bool (L,L): whether a token may see another, of its own or an earlier scale."""
    level_L = torch.cat([torch.full((h * w,), k) for k, (h, w) in enumerate(sides)])
    return level_L[:, None] >= level_L


class Pool(nn.Module):
    """The features of a prompt's tokens → one vector: a learned query per head looks at all of them."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.heads = max(1, text_width // (128 if width <= 4096 else 64))
        self.mat_q = nn.Parameter(torch.zeros(1, self.heads, width // self.heads))
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, text_BTC: Tensor, mask_BT: Tensor | None) -> Tensor:
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        k, v = F.linear(text_BTC, self.mat_kv.weight, bias).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.mat_q[:, :, None].to(k.dtype).expand(len(k), -1, -1, -1)
        mask = None if mask_BT is None else mask_BT[:, None, None]
        return self.proj(attend(q, k, v, mask).flatten(1))


class SelfAttention(nn.Module):
    """Attention whose queries and keys have length 1, the queries times a factor per head; no bias on keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, turns: Tensor | None, mask: Tensor | None, memory: Memory | None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = linear(self.mat_qkv, x_BLD, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.scale_mul.clamp(max=MOST).exp().to(q.dtype)
        k = F.normalize(k, dim=-1)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        if memory is not None:
            k, v = memory.add(k, v)
        return self.proj(attend(q, k, v, mask, scale=1.0))


class CrossAttention(nn.Module):
    """Attention of the picture to its own prompt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def keys_values(self, text_BTD: Tensor) -> Tensor:
        """(B,2,H,T,E) of the prompt."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        return linear(self.mat_kv, text_BTD, bias).unflatten(-1, (2, self.heads, -1)).permute(0, 2, 3, 1, 4)

    def forward(self, x_BLD: Tensor, text_BTD: Tensor, mask_BT: Tensor | None, memory: Memory | None) -> Tensor:
        q = self.mat_q(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = _once(memory, "text", lambda: self.keys_values(text_BTD)).unbind(1)
        mask = None if mask_BT is None else mask_BT[:, None, None]
        return self.proj(attend(q, k, v, mask))


class FeedForward(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, of prompts cross-attention, and a feed-forward network; the first and the last have a gate, a scale and a
    shift that follow from the condition."""

    def __init__(self, c: NextScaleConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(c.width, c.heads)
        self.ffn = FeedForward(c.width, c.inner)
        if c.text_width is not None:
            self.cross, self.ca_norm = CrossAttention(c.width, c.heads), nn.LayerNorm(c.width, eps=NORM_EPS)
        if c.shared_ada:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, c.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))

    def forward(
        self,
        x_BLD: Tensor,
        condition: Condition,
        ada_B6D: Tensor | None,
        turns: Tensor | None,
        mask: Tensor | None,
        memory: Memory | None,
        kept: Tensor | None,
    ) -> Tensor:
        own = _once(memory, "modulation", lambda: self.modulation(condition, ada_B6D))
        gate1, gate2, scale1, scale2, shift1, shift2 = own[:, :, None].unbind(1)
        if kept is not None:
            gate1, gate2 = gate1 * kept[0, :, None, None], gate2 * kept[1, :, None, None]
        x_BLD = x_BLD + gate1 * self.attn(normed(x_BLD) * (1 + scale1) + shift1, turns, mask, memory)
        if condition.text_BTD is not None:
            x_BLD = x_BLD + self.cross(self.ca_norm(x_BLD), condition.text_BTD, condition.mask_BT, memory)
        return x_BLD + gate2 * self.ffn(normed(x_BLD) * (1 + scale2) + shift2)

    def modulation(self, condition: Condition, ada_B6D: Tensor | None) -> Tensor:
        """Gates, scales and shifts (B,6,D)."""
        return self.ada_lin(condition.vector_BD).unflatten(-1, (6, -1)) if ada_B6D is None else self.ada_gss[0] + ada_B6D


class HeadNorm(nn.Module):
    """The last norm, with scale and shift from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLD: Tensor, vector_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(vector_BD)[:, None].chunk(2, dim=-1)
        return normed(x_BLD) * (1 + scale) + shift


def _once(memory: Memory | None, name: str, make: Callable[[], Tensor]) -> Tensor:
    return make() if memory is None else memory.fixed(name, make)


def normed(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
