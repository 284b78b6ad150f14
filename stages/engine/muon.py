"""Muon: the momentum of a matrix, made orthogonal, is its step (Keller Jordan, 2024; kellerjordan.github.io/posts/muon).

Every direction of a matrix then moves equally far, those of rare things as far as those of frequent ones. The step is scaled to
the size that AdamW's steps have (Moonlight, arXiv 2502.16982), so that one learning rate serves both.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.engine import processes

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that draws all singular values towards 1
RMS = 0.2  # of a step of AdamW, about


def matrices(module: nn.Module) -> set[int]:
    """Ids of the weights that Muon is for: those of linear layers, without those that an embedding shares or that end in the
    vocabulary."""
    embedded = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    linear = {id(p.weight) for name, p in module.named_modules() if isinstance(p, nn.Linear) and not name.endswith("lm_head")}
    return linear - embedded


@torch.no_grad()
def orthogonal(matrix_MN: Tensor) -> Tensor:
    """Nearly U·Vᵀ of a matrix U·S·Vᵀ, in bfloat16: singular values between about 0.7 and 1.2 instead of S (Newton–Schulz)."""
    a, b, c = COEFFICIENTS
    x = matrix_MN.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


@torch.no_grad()
def directions(momenta: list[Tensor]) -> list[Tensor]:
    """Of every momentum the orthogonal matrix; the processes share the work, and all get all of them."""
    rank, world = processes.rank(), processes.world()
    found = [
        orthogonal(m).contiguous() if i % world == rank else torch.empty_like(m, dtype=torch.bfloat16)
        for i, m in enumerate(momenta)
    ]
    if world > 1:
        for i, direction in enumerate(found):
            dist.broadcast(direction, i % world)
    return found


@torch.no_grad()
def step(weights: list[nn.Parameter], momenta: list[Tensor], lr: float, weight_decay: float) -> None:
    """One step of matrices that have a gradient, by Nesterov's momentum, which is updated in place."""
    ahead = []
    for w, m in zip(weights, momenta, strict=True):
        assert w.grad is not None
        ahead.append(w.grad.lerp(m.lerp_(w.grad, 1 - MOMENTUM), MOMENTUM))
    for w, direction in zip(weights, directions(ahead), strict=True):
        w.mul_(1 - lr * weight_decay).add_(direction.to(w.dtype), alpha=-lr * RMS * max(w.shape) ** 0.5)
