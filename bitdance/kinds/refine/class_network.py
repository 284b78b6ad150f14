"""The class-conditional network of refinement: labels, time and class → logits of every label. Parameter names of the
published code.

B rows, N = h·w tokens, G labels per token, V values of a label, D hidden size, H heads, E width of a head.
Source: GRN paper (arXiv 2604.13030), class-conditional models; published code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitdance.heads.attend import attend
from bitdance.kinds.refine.config import ClassRefineConfig
from bitdance.kinds.refine.labels import value_major
from bitdance.kinds.refine.parts import RMSNorm, TimeEmbedding, heads_of
from bitdance.networks.rotary import frequencies, rotate, turns_of


class ClassRefineNetwork(nn.Module):
    """A transformer whose norms are modulated by time and class; tokens of the class stand before the picture's."""

    def __init__(self, config: ClassRefineConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.x_embedder = LabelEmbedding(c.values * c.label_count, c.bottleneck, c.width)
        self.t_embedder = TimeEmbedding(c.width)
        self.y_embedder = ClassEmbedding(c.num_classes + 1, c.width)
        self.register_buffer("pos_embed", position_table(c.grid, c.width)[None])
        self.in_context_posemb = nn.Parameter(torch.zeros(1, c.in_context_len, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.width, c.values * c.label_count)
        self.checkpoint_layers = False  # in training, keep a block's input alone and compute the rest again in the backward pass
        self._turns_NG2: Tensor | None = None
        self.initialise(generator)

    @property
    def null_class(self) -> int:
        """The class that stands for none: one beyond the others."""
        return self.config.num_classes

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights, as the published code starts training: every block is the identity, every logit 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1), generator=generator)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.zero_()
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            layer.weight.normal_(std=0.02, generator=generator)
        self.in_context_posemb.normal_(std=0.02, generator=generator)
        for block in (*self.blocks, self.final_layer):
            block.adaLN_modulation[1].weight.zero_()
        self.final_layer.linear.weight.zero_()

    def forward(self, labels_BGhw: Tensor, time_B: Tensor, class_B: Tensor) -> Tensor:
        """Labels, shares of kept ones and class numbers → logits (B,G,h,w,V), float32."""
        c, (h, w) = self.config, labels_BGhw.shape[2:]
        one_hot = value_major(labels_BGhw, c.values).to(self.x_embedder.proj1.weight.dtype)
        x_BLD = self.x_embedder(one_hot).flatten(2).transpose(1, 2) + self.pos_embed
        class_BD = self.y_embedder.embedding_table(class_B)
        condition_BD = F.silu(self.t_embedder(time_B) + class_BD)  # every modulation reads it
        turns_NG2 = self._turns(x_BLD.device)
        for i, block in enumerate(self.blocks):
            if i == c.in_context_start and c.in_context_len:
                x_BLD = torch.cat([class_BD[:, None] + self.in_context_posemb, x_BLD], dim=1)
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, condition_BD, turns_NG2, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, condition_BD, turns_NG2)
        logits = self.final_layer(x_BLD[:, -h * w :], condition_BD)
        return logits.unflatten(-1, (c.values, c.label_count)).unflatten(1, (h, w)).permute(0, 4, 1, 2, 3)

    def _turns(self, device: torch.device) -> Tensor:
        if self._turns_NG2 is None or self._turns_NG2.device != device:
            with torch.inference_mode(False):  # must also serve a later training step
                self._turns_NG2 = grid_turns(self.config.grid, self.config.head_width).to(device)
        return self._turns_NG2


class LabelEmbedding(nn.Module):
    """One-hot labels (B,V·G,h,w) → (B,D,h,w) through a bottleneck."""

    def __init__(self, channels: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, 1, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, 1)

    def forward(self, one_hot: Tensor) -> Tensor:
        return self.proj2(self.proj1(one_hot))


class ClassEmbedding(nn.Module):
    """A vector per class; the last one stands for none."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)


class Attention(nn.Module):
    """Full attention with normed queries and keys; the last tokens, the picture's, have positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, turns_NG2: Tensor) -> Tensor:
        q, k, v = (heads_of(part, self.heads) for part in self.qkv(x_BLD).chunk(3, dim=-1))
        q, k = (_turned(norm(x), turns_NG2) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(attend(q, k, v))


class SwiGLU(nn.Module):
    """W3 (silu(a)·b) with (a, b) = W12 x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(8 * width / 3)
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and SwiGLU, each with a shift, a scale and a gate that follow from time and class."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 6 * width))

    def forward(self, x_BLD: Tensor, condition_BD: Tensor, turns_NG2: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_BD)[:, None].chunk(6, dim=-1)
        x_BLD = x_BLD + gate1 * self.attn(self.norm1(x_BLD) * (1 + scale1) + shift1, turns_NG2)
        return x_BLD + gate2 * self.mlp(self.norm2(x_BLD) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """A modulated norm, then the logits of all labels, value by value, in float32."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_BD)[:, None].chunk(2, dim=-1)
        x_BLD = self.norm_final(x_BLD) * (1 + scale) + shift
        with torch.autocast(x_BLD.device.type, enabled=False):
            return F.linear(x_BLD.float(), self.linear.weight.float(), self.linear.bias.float())


def position_table(grid: int, width: int) -> Tensor:
    """(N,D) float32: the first half of the channels for the column, the second for the row, each [sin | cos]."""
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies(width // 4)
    side = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = side[:, None].expand(-1, grid, -1), side[None].expand(grid, -1, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def grid_turns(grid: int, head_width: int) -> Tensor:
    """(N, E/2, 2): the first half of a head's pairs turns by the row, the second by the column."""
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies(head_width // 4)
    rows, columns = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
    return turns_of(torch.cat([rows, columns], dim=-1).flatten(0, 1))


def _turned(x_BHLE: Tensor, turns_NG2: Tensor) -> Tensor:
    before = x_BHLE.shape[2] - len(turns_NG2)
    if not before:
        return rotate(x_BHLE, turns_NG2)
    return torch.cat([x_BHLE[:, :, :before], rotate(x_BHLE[:, :, before:], turns_NG2)], dim=2)
