"""Floating point operations and bytes of making pictures, by phase, in closed form from configs alone.

A product of (k,n) and (n,m) is 2·k·n·m operations, reads its weights and its input and writes its output once, and is one kernel
to launch; attention, and a convolution, likewise. Elementwise work counts as fused with the products, so what follows is a floor,
and a cache that keeps weights between two calls can go below it. Tests compare all three with what torch does at the real shape.

B pictures, R rows of the backbone (with guidance 2B), P tokens per block, M blocks, D hidden size, W width of the head.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdance.costs.peak import Peak
from bitdance.folder.config import ModelConfig
from bitdance.generate import padded_length
from bitdance.heads.diffusion.sampler import SAMPLERS, guided_velocity
from bitdance.heads.diffusion.settings import Sampling
from bitdance.networks.attention import padding_runs

PHASES = ("prefill", "llm", "head", "projector", "decode")


@dataclass(frozen=True)
class Work:
    """What one phase costs: floating point operations, bytes read and written, kernels to launch."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.kernels + other.kernels)

    def times(self, count: float) -> "Work":
        """This work done `count` times."""
        return Work(self.flops * count, self.bytes * count, self.kernels * count)

    def roofline(self, peak: Peak) -> float:
        """Seconds below which a machine of this peak cannot do it (the roofline model, Williams et al. 2009)."""
        return max(self.flops / peak.flops_per_s, self.bytes / peak.bytes_per_s)


def turning_batch(one: Work, two: Work, peak: Peak) -> int | None:
    """From which batch size on a phase, of which the work with one and with two pictures is given, takes a machine of this peak
    longer to compute than to read and write its numbers; None: never. Its operations and bytes grow evenly with the batch, and
    what bytes there are without a picture are its weights."""
    each, weights = two.bytes - one.bytes, 2 * one.bytes - two.bytes
    ahead = one.flops / peak.flops_per_s - each / peak.bytes_per_s  # seconds by which arithmetic grows quicker, per picture
    return max(1, math.ceil(weights / peak.bytes_per_s / ahead)) if ahead > 0 else None


@dataclass(frozen=True)
class Generation:
    """`batch` pictures of one prompt. `text`: its tokens in the conditional and the unconditional template. Bytes of a number:
    `itemsize`, but for the weights in the backbone's layers and in the head's blocks, which may be quantised (None: the same).
    """

    height: int
    width: int
    batch: int
    sampling: Sampling
    text: tuple[int, int]
    itemsize: int
    backbone_weight: float | None = None
    head_weight: float | None = None

    def prefixes(self, P: int) -> list[int]:
        """Positions ahead of image block 1 in each of the R rows."""
        branches = self.text if self.sampling.guided else self.text[:1]
        return [text + 2 + P for text in branches for _ in range(self.batch)]


def work(model: ModelConfig, load: Generation) -> dict[str, Work]:
    """The work of each phase, as `bitdance.generate` goes about it: see `PHASES`."""
    M, P = model.blocks(load.height, load.width), model.head.parallel_num
    D, C, B = model.head.ch_cond, model.head.ch_target, load.batch
    prefixes = load.prefixes(P)
    padded = padded_length(max(prefixes))
    steps = [_backbone(model, load, P, [n + m * P for n in prefixes]) for m in range(1, M)]
    projection = _product(B * P, C, D, load.itemsize) + _product(B * P, D, D, load.itemsize)
    return {
        "prefill": _backbone(model, load, padded, [padded] * len(prefixes)),
        "llm": sum(steps, Work()),
        "head": sum((_head(model, load, n).times(count) for n, count in Counter(load.sampling.block_steps(M)).items()), Work()),
        "projector": projection.times(M - 1),
        "decode": _decode(model, load).times(B),
    }


def evaluations(sampling: Sampling, steps: int, time_shift: float = 1.0) -> list[int]:
    """Evaluations of the head for one block: the branches of each, 2 where guidance acts. Told by the sampler itself."""
    branches = []

    def denoise(x_KPC: Tensor, t: float, both: bool) -> Tensor:
        branches.append(2 if both else 1)
        return x_KPC.repeat(branches[-1], 1, 1)

    def velocity(x_KPC: Tensor, t: float) -> Tensor:
        return guided_velocity(denoise, x_KPC, t, sampling.between_branches, sampling.guidance_interval)

    nothing = torch.zeros(1, 1, 1)
    SAMPLERS[sampling.sampler](velocity, nothing, steps, lambda: nothing, time_shift)
    return branches


def _product(rows: float, n: int, m: int, itemsize: float, weight: float | None = None) -> Work:
    """A linear layer n → m for so many rows, `weight` bytes in each of its weights."""
    weight = itemsize if weight is None else weight
    return Work(2 * rows * n * m, weight * n * m + itemsize * rows * (n + m), 1)


def _backbone(model: ModelConfig, load: Generation, new: int, lengths: Sequence[int]) -> Work:
    """One call: `new` positions in each row, which see as many keys as its length; neighbouring rows of equal length share a
    kernel. Feed-forward layers are gated, as in all families that `Backbone` names."""
    lm, E, rows = model.backbone, model.head_dim, new * len(lengths)
    D, inner, layers = lm["hidden_size"], lm["intermediate_size"], lm["num_hidden_layers"]
    queries, keys = lm["num_attention_heads"] * E, model.key_heads * E
    products = [(D, queries), (D, keys), (D, keys), (queries, D), (D, inner), (D, inner), (inner, D)]
    layer = sum((_product(rows, n, m, load.itemsize, load.backbone_weight) for n, m in products), Work())
    seen = sum(lengths)
    attention = Work(4 * queries * new * seen, load.itemsize * 2 * (keys * seen + queries * rows), len(padding_runs(lengths)))
    return (layer + attention).times(layers)


def _head(model: ModelConfig, load: Generation, steps: int) -> Work:
    """All evaluations for one block of every picture; embedded times are kept from picture to picture."""
    c, size = model.head, load.itemsize
    W, P, inner = c.ch_latent, c.parallel_num, int(1.5 * c.ch_latent)
    block = [(W, 3 * W), (W, W), (W, (2 if c.use_swiglu else 1) * inner), (inner, W)]
    others = [(W, 6 * W)] * c.depth_adanln + [(W, 2 * W), (W, c.ch_target)]
    total = _product((2 if load.sampling.guided else 1) * load.batch * P, c.ch_cond, W, size)
    calls = evaluations(load.sampling, steps, c.time_shift)
    for branches in set(calls):
        rows = branches * load.batch * P
        blocks = sum((_product(rows, n, m, size, load.head_weight) for n, m in block), Work())
        blocks += Work(4 * W * P * rows, size * 4 * W * rows, 1)  # attention
        once = sum((_product(rows, n, m, size) for n, m in others), blocks.times(c.depth_latent))
        once += _product(load.batch * P, c.ch_target, W, size)
        total += once.times(calls.count(branches))
    return total


def _decode(model: ModelConfig, load: Generation) -> Work:
    """One picture through the decoder."""
    c, itemsize = model.tokenizer, load.itemsize
    widths = [c.ch * factor for factor in c.ch_mult]
    pixels = load.height * load.width // c.stride**2

    def conv(n: int, m: int, kernel: int = 3) -> Work:
        return Work(2 * pixels * n * m * kernel**2, itemsize * (n * m * kernel**2 + pixels * (n + m)), 1)

    total = conv(c.z_channels * (2 if c.gan_decoder else 1), widths[-1])
    total += conv(widths[-1], widths[-1]).times(2 * c.num_res_blocks)
    width = widths[-1]
    for level in reversed(range(len(widths))):
        total += _product(1, c.z_channels, width, itemsize).times(2)  # gamma and beta
        for _ in range(c.num_res_blocks):
            total += conv(width, widths[level]) + conv(widths[level], widths[level])
            if width != widths[level]:
                total += conv(width, widths[level], 1)
            width = widths[level]
        if level:
            total += conv(width, 4 * width)
            pixels *= 4
    return total + conv(width, 3)
