"""Two renditions of a model, teacher-forced: given the same earlier bits and the same random draws, which bits do they predict?

Free-running generation says little about two dtypes: one bit that differs changes every later block. So the reference makes
pictures, and then both predict each of their blocks from the reference's bits before it.

B pictures, R rows (with guidance 2B), M blocks, P tokens per block, C bits, D hidden size, S draws of a block.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitdance.generate import generate_bits
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.sampler import draws
from bitdance.heads.diffusion.settings import Sampling
from bitdance.model import BitDanceModel
from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import conditional_ids, unconditional_ids


@torch.no_grad()
def reference_bits(
    model: BitDanceModel, prompts: Sequence[str], h: int, w: int, sampling: Sampling, seeds: Sequence[int]
) -> Tensor:
    """The pictures that the reference makes of its own accord: bits (B,C,h,w) on the CPU."""
    return torch.cat(
        [
            generate_bits(model, [prompt], h, w, sampling, [torch.Generator().manual_seed(seed)]).cpu()
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )


@torch.no_grad()
def forced_predictions(
    model: BitDanceModel, prompts: Sequence[str], bits_BChw: Tensor, sampling: Sampling, seeds: Sequence[int]
) -> Tensor:
    """What the sampler ends with for every block, given the bits of all blocks before: (B,M,P,C), float32, on the CPU.

    One pass of the backbone over the whole picture under the block-causal mask gives the states of all blocks; the random draws
    are those that `generate_bits` takes for these seeds. So the signs of a model's predictions for its own pictures are their
    bits, as far as a pass with and one without a cache round alike.
    """
    return torch.cat([_one(model, *each, sampling) for each in zip(prompts, bits_BChw, seeds, strict=True)])


def _one(model: BitDanceModel, prompt: str, bits_Chw: Tensor, seed: int, sampling: Sampling) -> Tensor:
    C, h, w = bits_Chw.shape
    plan, P = PatchPlan(h, w, model.patch_side), model.block_size
    texts = [conditional_ids(model.text_tokenizer, prompt)]
    if sampling.guided:
        texts.append(unconditional_ids(model.text_tokenizer))
    batch = build_batch([[TextPiece(ids), ImagePiece(bits_Chw)] for ids in texts], model.patch_side, model.special)
    batch = batch.to(model.backbone.device)
    hidden_KD = model.hidden(batch).flatten(0, 1)[batch.predict_index_K]
    hidden_KD = hidden_KD + sincos_2d(batch.image_row_N, batch.image_col_N, hidden_KD.shape[-1], hidden_KD.dtype, batch.side)
    cond_RMPD = hidden_KD.unflatten(0, (len(texts), plan.num_blocks, P))
    sample, generator = BlockSampler(model.head, compile=False), torch.Generator().manual_seed(seed)
    predicted: list[Tensor] = []
    for m, steps in enumerate(sampling.block_steps(plan.num_blocks)):
        noise_S1PC = torch.stack([torch.randn(1, P, C, generator=generator) for _ in range(draws(sampling.sampler, steps))])
        predicted.append(sample(cond_RMPD[:, m], noise_S1PC.to(hidden_KD.device), sampling, steps).float().cpu())
    return torch.stack(predicted, dim=1)


def agreement(reference_BMPC: Tensor, other_BMPC: Tensor) -> dict[str, Any]:
    """Share of bits that are the same and mean absolute difference of the predictions; the same by block (M values)."""
    same = (reference_BMPC > 0) == (other_BMPC > 0)
    apart = (reference_BMPC - other_BMPC).abs()
    return {
        "bits": same.numel(),
        "agree": float(same.double().mean()),
        "differ": int((~same).sum()),
        "mean_difference": float(apart.double().mean()),
        "agree_by_picture": same.double().mean((1, 2, 3)).tolist(),
        "agree_by_block": same.double().mean((0, 2, 3)).tolist(),
    }
