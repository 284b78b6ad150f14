"""Classes → bits, by the autoregressive loop (`bitdance.loop`).

B pictures, R rows (B conditional, then with guidance B of the null class), P tokens per block, C bits per token, D hidden size.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.discrete import DiscreteHead, DiscreteSampler
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.settings import ClassSettings
from bitdance.loop import Noise, OnBlock, Sampler, predict


def generate_bits(
    model: ClassPatchModel,
    classes: Sequence[int],
    settings: ClassSettings,
    generators: Sequence[torch.Generator],
    on_block: OnBlock | None = None,
    noise: Noise | None = None,
    block_sampler: Sampler | None = None,
    cancelled: Collection[int] = (),
) -> Tensor:
    """One picture per class → bits (B,C,h,w) in {-1,+1}, or numbers where those are its tokens; float32, on its device.

    See `bitdance.loop.predict`.

    A block without guidance in a guided run (the first of the linear schedule) is sampled for the null class too.
    """
    if len(generators) != len(classes) or not classes:
        raise ValueError(f"{len(classes)} classes and {len(generators)} generators; give one generator per class")
    sample = block_sampler or sampler_of(model)
    predictor, c = _Predictor(model, classes, settings.guided), model.config
    blocks = settings.blocks(c.num_blocks)
    return predict(predictor, sample, c.plan, blocks, c.latent_dim, generators, on_block, noise, cancelled, c.numbers)


def sampler_of(model: ClassPatchModel) -> Sampler:
    """What makes bits of the conditions of a block; keep one per model."""
    # OURS: no CUDA graphs yet. One is recorded for one guidance, and here every block has its own.
    return DiscreteSampler(model.head) if isinstance(model.head, DiscreteHead) else BlockSampler(model.head, compile=False)


class _Predictor:
    """See `bitdance.loop.Predictor`."""

    def __init__(self, model: ClassPatchModel, classes: Sequence[int], guided: bool) -> None:
        self.model, self.memory = model, model.new_memory()
        rows = [*classes, *[model.null_class] * len(classes)] if guided else list(classes)
        self.class_R = torch.tensor(rows, device=model.pos_for_diff.weight.device)

    def begin(self) -> Tensor:
        return self.model.prefix(self.class_R, self.memory) + self.model.place(0)

    def extend(self, bits_KPC: Tensor, m: int) -> Tensor:
        bits_RPC = bits_KPC.repeat(len(self.class_R) // len(bits_KPC), 1, 1)
        return self.model.extend(bits_RPC, m, self.memory) + self.model.place(m + 1)

    def keep(self, rows: Sequence[int]) -> None:
        self.class_R = self.class_R[list(rows)]
        for layer in self.memory:
            layer.keep(rows)
