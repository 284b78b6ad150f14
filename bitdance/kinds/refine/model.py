"""A refinement model: one of the two networks with its training loss. The loss does not ask which network it is.

B pictures, G labels per token, V values of a label, h w token grid.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdance.kinds.refine.class_network import ClassRefineNetwork
from bitdance.kinds.refine.config import ClassRefineConfig, RefineConfig, TextRefineConfig
from bitdance.kinds.refine.labels import labels_of
from bitdance.kinds.refine.noise import RefineNoise
from bitdance.kinds.refine.text_network import TextRefineNetwork

Network = ClassRefineNetwork | TextRefineNetwork


def build_network(config: RefineConfig, generator: torch.Generator | None = None) -> Network:
    """The network of a config, with fresh weights."""
    if isinstance(config, ClassRefineConfig):
        return ClassRefineNetwork(config, generator)
    assert isinstance(config, TextRefineConfig)
    return TextRefineNetwork(config, generator)


def label_losses(network: Network, bits_BChw: Tensor, condition: Any, noise: RefineNoise) -> Tensor:
    """Cross-entropy of every label (B,G,h,w) given a partly random grid; the mean over all of them is what is trained.

    `condition`: class numbers (B,), of which the dropped ones become the null class; or a `TextMemory`, in which dropped prompts
    are replaced already. Bits (B,C,h,w) in {-1,+1}.
    Source: GRN paper (arXiv 2604.13030), training objective; published code. Of published text models the joint one is told the
    share of labels that is really kept, the others the nominal share.
    """
    labels_BGhw = labels_of(bits_BChw, network.config)
    time_B = noise.time_B
    if isinstance(network, TextRefineNetwork):
        if network.config.attention == "joint":
            time_B = noise.kept_BGhw.float().mean(dim=(1, 2, 3))
    elif noise.dropped_B is not None:
        condition = condition.masked_fill(noise.dropped_B, network.null_class)
    logits_BGhwV = network(noise.corrupted(labels_BGhw), time_B, condition)
    return F.cross_entropy(logits_BGhwV.movedim(-1, 1), labels_BGhw, reduction="none")
