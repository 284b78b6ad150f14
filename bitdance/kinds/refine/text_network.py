"""The text-conditional network of refinement: labels, time and a prompt's features → logits of every label.

It is built like Qwen3's layers, without a causal mask. A token of the picture, one for the time and those of the text stand in
one sequence; positions turn in three parts (frame, row, column), which keep the three kinds of token apart. With "prefix" the
text sees itself alone, so its keys and values are computed once for all steps; with "joint" everything sees everything.

B rows, T text tokens, N = h·w picture tokens, G labels per token, V values of a label, D hidden size, H heads, E width of a head.
Source: GRN paper (arXiv 2604.13030), text-to-image models; published code.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitdance.heads.attend import attend
from bitdance.kinds.refine.config import TextRefineConfig
from bitdance.kinds.refine.labels import label_major
from bitdance.kinds.refine.parts import RMSNorm, TimeEmbedding, heads_of
from bitdance.networks.rotary import frequencies, rotate, turns_of

TIME_FRAME, PICTURE_FRAME = 512, 600  # frame positions; a text token's is its number
TRAINED_AREA = 16875  # of the grid that rows and columns are stretched to
NEAR = 0.05  # published grids, whose sides are rounded, differ from their ratio by less
_TALL = (3, 5 / 2, 2, 16 / 9, 3 / 2, 4 / 3, 1.16, 1)
RATIOS = tuple(dict.fromkeys(sorted((*_TALL, *(1 / ratio for ratio in _TALL)))))  # height / width


@dataclass(frozen=True)
class TextMemory:
    """A batch of prompts as the layers read it: projected features (B,T,D), or with "prefix" keys and values (B,H,T,E) by layer.
    `mask_BT` is False at padding, None where there is none; `turns_T` are the positions of the text."""

    text_BTD: Tensor | None
    layers: list[tuple[Tensor, Tensor]]
    mask_BT: Tensor | None
    turns_TF2: Tensor


class TextRefineNetwork(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: TextRefineConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        channels = c.label_count * c.values
        self.word_embed = nn.Linear(channels, c.width)
        self.text_proj = nn.Linear(c.text_width, c.width)
        self.pt_embedder = TimeEmbedding(c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.inner) for _ in range(c.depth))
        self.head = Head(c.width, channels)
        self.checkpoint_layers = False  # in training, keep a block's input alone and compute the rest again in the backward pass
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights, as the published code starts training: normal of width 0.02, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()

    def prepare(self, features_BTE: Tensor, lengths: list[int]) -> TextMemory:
        """Features of prompts, padded at the right to the longest of `lengths`, → what `forward` reads of them at every step."""
        T = features_BTE.shape[1]
        text_BTD = self.text_proj(features_BTE.to(self.text_proj.weight.dtype))
        turns_TF2 = text_turns(T, self.config.head_width).to(text_BTD.device)
        mask_BT = None
        if any(length < T for length in lengths):
            mask_BT = torch.arange(T, device=text_BTD.device) < torch.tensor(lengths, device=text_BTD.device)[:, None]
        if self.config.attention == "joint":
            return TextMemory(text_BTD, [], mask_BT, turns_TF2)
        layers, x_BTD = [], text_BTD
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x_BTD, turns_TF2)
            layers.append((k, v))
            if i + 1 < len(self.blocks):
                x_BTD = block.mix(x_BTD, attend(q, k, v, _wide(mask_BT)))
        return TextMemory(None, layers, mask_BT, turns_TF2)

    def forward(self, labels_BGhw: Tensor, time_B: Tensor, memory: TextMemory) -> Tensor:
        """Labels and shares of kept ones → logits (B,G,h,w,V), float32."""
        c, (h, w) = self.config, labels_BGhw.shape[2:]
        N = h * w
        x_BND = self.word_embed(label_major(labels_BGhw, c.values).to(self.word_embed.weight.dtype))
        time_B1D = self.pt_embedder(time_B)[:, None]
        own_LF2 = [picture_turns(h, w, c.head_width).to(x_BND.device)]
        parts = [x_BND, time_B1D]
        if memory.text_BTD is not None:
            parts.insert(1, memory.text_BTD)
            own_LF2.append(memory.turns_TF2)
        x_BLD = torch.cat(parts, dim=1)
        turns_LF2 = torch.cat([*own_LF2, time_turns(c.head_width).to(x_BND.device)])
        mask = self._mask(memory, N)
        for i, block in enumerate(self.blocks):
            before = memory.layers[i] if memory.layers else None
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, turns_LF2, before, mask, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, turns_LF2, before, mask)
        return self.head(x_BLD[:, :N]).unflatten(1, (h, w)).unflatten(-1, (c.label_count, c.values)).permute(0, 3, 1, 2, 4)

    def _mask(self, memory: TextMemory, N: int) -> Tensor | None:
        """(B,1,1,S) over keys in their order: text, picture, time, or picture, text, time."""
        if memory.mask_BT is None:
            return None
        ahead, behind = (0, N + 1) if memory.layers else (N, 1)
        return _wide(F.pad(memory.mask_BT, (ahead, behind), value=True))


def _wide(mask_BS: Tensor | None) -> Tensor | None:
    return None if mask_BS is None else mask_BS[:, None, None]


class Attention(nn.Module):
    """Projections without biases, normed queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)


class SwiGLU(nn.Module):
    """Down (silu(gate x)·up x), without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Normed attention and normed SwiGLU, each added to what came in."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = SwiGLU(width, inner)

    def project(self, x_BLD: Tensor, turns_LF2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B,H,L,E), the first two turned by their positions."""
        x, a = self.input_layernorm(x_BLD), self.attn
        q, k, v = (heads_of(layer(x), a.heads) for layer in (a.q_proj, a.k_proj, a.v_proj))
        return rotate(a.q_norm(q), turns_LF2), rotate(a.k_norm(k), turns_LF2), v

    def mix(self, x_BLD: Tensor, mixed_BLD: Tensor) -> Tensor:
        """What attention gave, then the feed-forward network, added to x."""
        x_BLD = x_BLD + self.attn.o_proj(mixed_BLD)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))

    def forward(self, x_BLD: Tensor, turns_LF2: Tensor, before: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """`before`: keys and values that stand in front."""
        q, k, v = self.project(x_BLD, turns_LF2)
        if before is not None:
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        return self.mix(x_BLD, attend(q, k, v, mask))


class Head(nn.Module):
    """The last norm, then the logits of all labels, label by label, in float32."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.proj = nn.Linear(width, channels)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.proj(self.norm(x_BND)).float()


def turns_at(frame_L: Tensor, row_L: Tensor, column_L: Tensor, head_width: int) -> Tensor:
    """(L, E/2, 2): a sixth of a head's channels (in pairs) turns by the frame, as many by the row, the rest by the column."""
    third = head_width // 6
    counts = (third, third, head_width // 2 - 2 * third)
    angles = [place.double()[:, None] * frequencies(n) for place, n in zip((frame_L, row_L, column_L), counts, strict=True)]
    return turns_of(torch.cat(angles, dim=1))


def text_turns(T: int, head_width: int) -> Tensor:
    """Of text tokens 0 … T - 1, which stand at row and column 0."""
    place = torch.arange(T)
    return turns_at(place, 0 * place, 0 * place, head_width)


def time_turns(head_width: int) -> Tensor:
    """Of the one token of the time."""
    frame = torch.tensor([TIME_FRAME])
    return turns_at(frame, 0 * frame, 0 * frame, head_width)


def picture_turns(h: int, w: int, head_width: int) -> Tensor:
    """Of the picture's tokens, row by row; a grid of any size is stretched to the area that its shape was trained with."""
    rows, columns = grid_places(h, w)
    row_N, column_N = (place.flatten() for place in torch.meshgrid(rows, columns, indexing="ij"))
    return turns_at(torch.full_like(row_N, PICTURE_FRAME), row_N, column_N, head_width)


def grid_places(h: int, w: int) -> tuple[Tensor, Tensor]:
    """The positions of rows (h,) and columns (w,). A grid has the ratio of the published one that it is near, or its own."""
    nearest = min(RATIOS, key=lambda known: abs(known - h / w))
    ratio = math.floor((nearest if abs(nearest * w / h - 1) < NEAR else h / w) * 1000) / 1000
    side = math.sqrt(TRAINED_AREA / ratio)
    tall, wide = int(ratio * side), int(side)
    return torch.tensor([round(r * tall / h) for r in range(h)]), torch.tensor([round(c * wide / w) for c in range(w)])


def grid_of(ratio: float, side: int) -> tuple[int, int]:
    """(h, w) in tokens of the published size class `side` (64: one megapixel) at a ratio height / width."""
    width = math.sqrt(side**2 / ratio)
    return round(ratio * width), round(width)
