"""Bits ⇄ labels, and labels as the networks read them.

B pictures, C bits per token, M rounds, G labels per token, V values of a label, h w token grid, N = h·w.
Source: GRN paper (arXiv 2604.13030), section on GRN_ind and GRN_bit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdance.kinds.refine.config import RefineConfig


def labels_of(bits_BChw: Tensor, config: RefineConfig) -> Tensor:
    """Bits in {-1,+1}, round by round, → labels (B,G,h,w), numbers from 0 to V - 1; the first round is the highest digit."""
    ones = (bits_BChw > 0).long()
    if config.labels == "bit":
        return ones
    rounds = ones.unflatten(1, (config.rounds, -1))
    weight = 2 ** torch.arange(config.rounds - 1, -1, -1, device=bits_BChw.device)
    return (rounds * weight[:, None, None, None]).sum(dim=1)


def bits_of(labels_BGhw: Tensor, config: RefineConfig) -> Tensor:
    """Labels → bits (B,C,h,w) in {-1,+1}, float32."""
    if config.labels == "bit":
        return labels_BGhw.float() * 2 - 1
    return torch.cat([(labels_BGhw >> (config.rounds - 1 - j) & 1).float() * 2 - 1 for j in range(config.rounds)], dim=1)


def value_major(labels_BGhw: Tensor, values: int) -> Tensor:
    """One-hot (B,V·G,h,w), channel k·G + g: as the class-conditional network reads labels."""
    return F.one_hot(labels_BGhw, values).permute(0, 4, 1, 2, 3).flatten(1, 2)


def label_major(labels_BGhw: Tensor, values: int) -> Tensor:
    """One-hot (B,N,G·V), channel g·V + k: as the text-conditional network reads labels."""
    return F.one_hot(labels_BGhw, values).permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(2)
