"""What a next-scale model learns: every scale's tokens from the condition and the scales before.

B pictures, L tokens of all scales, T bits of a token, V codes. Sources: VAR paper (arXiv 2404.02905), Infinity paper
(arXiv 2412.04431); public codes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdance.kinds.next_scale.network import Condition, NextScaleNetwork
from lfq_tokenizer.scales import ScaleQuantizer, Side


def token_losses(
    network: NextScaleNetwork,
    quantizer: ScaleQuantizer,
    latents_BZhw: Tensor,
    condition: Condition,
    sides: Sequence[Side],
    flipped: Sequence[Tensor | None] = (),
    kept: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of every token: (B,L) of codes, (B,L,T) of bits, scale by scale; the mean over all is what is trained.

    `sides` may be the first scales alone of those of the latents (`kept` and `smoothing`: of drop path and of labels).
    `flipped`: see `ScaleQuantizer.teach`.
    """
    whole = list(sides)
    targets, inputs = quantizer.teach(latents_BZhw, whole, flipped)
    return scale_losses(network, targets, inputs, condition, whole, kept, smoothing)


def scale_losses(
    network: NextScaleNetwork,
    targets: Sequence[Tensor],
    inputs: Sequence[Tensor],
    condition: Condition,
    sides: Sequence[Side],
    kept: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The same from targets and inputs that are known; fewer scales than `sides` where fewer are given."""
    logits = network(inputs, condition, sides, kept)
    if network.config.tokens == "codes":
        target_BL = torch.cat([one.flatten(1) for one in targets], dim=1)
        return F.cross_entropy(logits.movedim(-1, 1), target_BL, reduction="none", label_smoothing=smoothing)
    target_BLT = torch.cat([one.flatten(2).transpose(1, 2) for one in targets], dim=1)
    pair = logits.unflatten(-1, (network.config.latents, 2)).movedim(-1, 1)
    return F.cross_entropy(pair, (target_BLT > 0).long(), reduction="none", label_smoothing=smoothing)


def scale_weights(sides: Sequence[Side], reweighted: bool) -> Tensor:
    """(L,) weights of tokens that sum to 1: all equal, or by √(tokens of the last scale / tokens of its own), which lets small
    scales count for more. Source: public code of Infinity."""
    last = sides[-1][0] * sides[-1][1]
    each = [(last / (h * w)) ** 0.5 if reweighted else 1.0 for h, w in sides]
    weights_L = torch.cat([torch.full((h * w,), weight, dtype=torch.float64) for weight, (h, w) in zip(each, sides, strict=True)])
    return weights_L / weights_L.sum()
