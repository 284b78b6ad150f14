"""The autoregressive loop of a class-conditional model: classes → bits, one block of P tokens per step.

B pictures, R rows (B conditional, then with guidance B of the null class), K rows that are sampled, P tokens per block, M
blocks, C bits per token, D hidden size, S draws. Source: published class-conditional code for the order of random draws.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import draws
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.settings import ClassSettings
from lfq_tokenizer.binary import binarize_unchecked, check_lost

OnBlock = Callable[[int, int, Tensor], None]
Noise = Callable[[int], Tensor]


@torch.no_grad()
def generate_bits(
    model: ClassPatchModel,
    classes: Sequence[int],
    settings: ClassSettings,
    generators: Sequence[torch.Generator],
    on_block: OnBlock | None = None,
    noise: Noise | None = None,
    block_sampler: BlockSampler | None = None,
    cancelled: Collection[int] = (),
) -> Tensor:
    """One picture per class → bits (B,C,h,w) in {-1,+1}, float32, on the model's device.

    A block without guidance in a guided run (the first of the linear schedule) is sampled for the null class too, on its own:
    each branch then goes on from its own bits, as in the published code. Otherwise both read the same.
    Picture i draws from `generators[i]` alone, per block the initial noise and one draw per stochastic step, of (1,P,C), or
    (2,P,C) where the null class is sampled too; so it does not depend on its neighbours. `noise(rows)` replaces these draws by
    given ones of (rows,P,C), conditional rows first. `on_block(done, M, bits_BChw)` is called after each block, unfinished
    positions being 0; what it raises ends the run, and pictures whose number it adds to `cancelled` are not worked on any more.
    """
    if len(generators) != len(classes) or not classes:
        raise ValueError(f"{len(classes)} classes and {len(generators)} generators; give one generator per class")
    c, device = model.config, model.pos_for_diff.weight.device
    B, P, M, C = len(classes), c.parallel_num, c.num_blocks, c.latent_dim
    sample, plan, memory = block_sampler or BlockSampler(model.head, compile=False), c.plan, model.new_memory()
    branches = [list(classes), [model.null_class] * B] if settings.guided else [list(classes)]
    hidden_RPD = model.prefix(torch.tensor(branches, device=device).flatten(), memory)
    tokens_BNC = torch.zeros(B, c.num_tokens, C, device=device)
    lost, alive = tokens_BNC.new_zeros((), dtype=torch.long), list(range(B))
    for m, (sampling, steps) in enumerate(settings.blocks(M)):
        apart = len(branches) if not sampling.guided else 1  # branches that are sampled on their own
        count = draws(sampling.sampler, steps)
        drawn = [noise(apart * len(alive)) for _ in range(count)] if noise else _own(generators, alive, count, apart, P, C)
        noise_SKPC = torch.stack(drawn).to(device)
        bits_KPC, nans = binarize_unchecked(sample(hidden_RPD + model.place(m), noise_SKPC, sampling, steps))
        lost = lost + nans  # read at the end: until then nothing waits for the device
        rows_there = slice(None) if len(alive) == B else alive  # a list of rows would be sent to the device
        tokens_BNC[rows_there, m * P : (m + 1) * P] = bits_KPC[: len(alive)].float()
        if on_block is not None:
            on_block(m + 1, M, plan.unorder(tokens_BNC))
        going = [i for i, picture in enumerate(alive) if picture not in cancelled]
        if m == M - 1 or not going:  # the last block predicts nothing
            break
        inputs_RPC = bits_KPC.repeat(len(hidden_RPD) // len(bits_KPC), 1, 1)
        if len(going) < len(alive):
            rows = [branch * len(alive) + i for branch in range(len(branches)) for i in going]
            alive, inputs_RPC = [alive[i] for i in going], inputs_RPC[rows]
            for layer in memory:
                layer.keep(rows)
        hidden_RPD = model.extend(inputs_RPC, m, memory)
    check_lost(lost, tokens_BNC.numel())
    return plan.unorder(tokens_BNC)


def _own(generators: Sequence[torch.Generator], alive: Sequence[int], count: int, apart: int, P: int, C: int) -> list[Tensor]:
    """`count` standard normal draws of (apart·B,P,C): every picture's from its own generator, conditional rows first."""
    found = []
    for _ in range(count):
        rows_BAPC = [torch.randn((apart, P, C), generator=(g := generators[i]), device=g.device).cpu() for i in alive]
        found.append(torch.stack(rows_BAPC, dim=1).flatten(0, 1))
    return found
