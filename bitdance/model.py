"""The four parts (tokenizer, projector, backbone, head) and the training loss.

B rows, L sequence, F = B·L flat positions, N image tokens, G generated ones, R = G/P predicted blocks, P tokens per
block, T predicted text tokens, C bits per token, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import cross_entropy

from bitdance.heads.diffusion.network import BinaryDiffusionHead, draw_noise
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.sequence.batch import TrainingBatch
from bitdance.sequence.mask import dense_mask, flex_mask_mod
from bitdance.sequence.patches import patch_side
from bitdance.sequence.perturbation import perturb_bits
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import SpecialTokens

if TYPE_CHECKING:
    from lfq_tokenizer import LFQTokenizer

Attention = Literal["dense", "flex"]


@dataclass(frozen=True)
class TrainingLosses:
    """`total = vision + text_weight · text`. `vision` and `text` are means, 0 where the batch has nothing of that kind.

    `vision_rows` (rows, P) and `text_rows` (T,) are the same losses before the mean. Rows are the predicted blocks in
    the order of the batch, and all of them once more for each further repeat of the head's `diff_batch_mul`. Of each
    row: `time_rows` (rows,), its time, `predicted_rows` (rows, P, C), the head's one-step prediction of its bits, and
    `right_rows` (rows, P, C), bool: where that has the right sign.
    """

    total: Tensor
    vision: Tensor
    text: Tensor
    vision_rows: Tensor
    text_rows: Tensor
    time_rows: Tensor
    predicted_rows: Tensor
    right_rows: Tensor


class BitDanceModel(nn.Module):
    """Image tokenizer (or None, when bits come ready-made), text tokenizer, projector, backbone, head.

    Raises ValueError where two parts do not fit each other, naming both numbers.
    """

    def __init__(
        self,
        tokenizer: "LFQTokenizer | None",
        text_tokenizer: Any,
        projector: Projector,
        backbone: Backbone,
        head: BinaryDiffusionHead,
        extras: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        """`extras` is the content of `bitdance.json`, kept to be written again; `folder` is where the weights come from, None
        where they come from nowhere. `quantized` names the parts in 8 or 4 bits, with their kind."""
        super().__init__()
        self.extras: dict[str, Any] = dict(extras or {})
        self.folder = folder
        self.quantized: dict[str, str] = {}
        self.tokenizer = tokenizer
        self.text_tokenizer = text_tokenizer
        self.projector = projector
        self.backbone = backbone
        self.head = head
        self.special = SpecialTokens.from_tokenizer(text_tokenizer)
        self._check_fit()

    def _check_fit(self) -> None:
        config = self.head.config
        pairs = [
            ("bits per token of projector and head", self.projector.bits, config.ch_target),
            ("hidden size of projector and backbone", self.projector.hidden, self.backbone.hidden_size),
            ("hidden size of head and backbone", config.ch_cond, self.backbone.hidden_size),
        ]
        if self.tokenizer is not None:
            pairs.append(("bits per token of tokenizer and head", self.tokenizer.config.bits, config.ch_target))
        for what, first, second in pairs:
            if first != second:
                raise ValueError(f"{what} differ: {first} and {second}; all parts must come from the same model")
        patch_side(config.parallel_num)
        if len(self.text_tokenizer) > self.backbone.vocabulary_size:
            raise ValueError(
                f"the text tokenizer has {len(self.text_tokenizer)} tokens and the backbone an embedding of "
                f"{self.backbone.vocabulary_size}; call backbone.grow_vocabulary(len(text_tokenizer))"
            )
        if len(self.special.query_ids) < config.parallel_num - 1:
            raise ValueError(
                f"the head predicts {config.parallel_num} tokens per step, which needs {config.parallel_num - 1} "
                f"query tokens; the text tokenizer has {len(self.special.query_ids)} "
                "(bitdance.sequence.prompt.add_image_tokens adds more)"
            )

    @property
    def block_size(self) -> int:
        """P, tokens predicted per step."""
        return self.head.config.parallel_num

    @property
    def patch_side(self) -> int:
        """p, with p² = P."""
        return patch_side(self.block_size)

    def embed_image(self, bits_NC: Tensor, row_N: Tensor, col_N: Tensor, side: int | None = None) -> Tensor:
        """±1 bits (…,N,C) and their places, all below `side` → backbone inputs (…,N,D): projection plus 2-D position."""
        projected = self.projector(bits_NC)
        return projected + sincos_2d(row_N, col_N, self.projector.hidden, projected.dtype, side)

    def forward(
        self,
        batch: TrainingBatch,
        generator: torch.Generator | None = None,
        flip_max: float = 0.1,
        text_weight: float = 0.01,
        attention: Attention = "dense",
    ) -> TrainingLosses:
        """Losses of one batch. Draw order from `generator`: flips r1 and r2, then the head's times, then its noise.
        A batch that brings its noise uses that instead, and `flip_max` and `generator` have no part in it.

        Source: BitDance paper, arXiv 2602.14041, training section; numbers of the published training code (case
        `packed`).
        """
        hidden_FD = self.hidden(batch, generator, flip_max, attention).flatten(0, 1)
        nothing = 0.0 * hidden_FD[0].float().sum()  # zero, and still a function of the parameters

        text_rows, text = hidden_FD.new_zeros(0, dtype=torch.float32), nothing
        if batch.label_ids_T.numel():
            logits_TV = self.backbone.logits(hidden_FD[batch.label_index_T])
            text_rows = cross_entropy(logits_TV.float(), batch.label_ids_T, reduction="none")
            text = text_rows.mean()

        P, C = self.block_size, self.projector.bits
        vision_rows, vision = hidden_FD.new_zeros(0, P, dtype=torch.float32), nothing
        time_rows, predicted = vision_rows.new_zeros(0), vision_rows.new_zeros(0, P, C)
        right_rows = predicted > 0
        if batch.predict_index_K.numel():
            cond_RPD = self._conditions(hidden_FD, batch)
            bits_RPC = batch.image_bits_NC[batch.generated_K].unflatten(0, (-1, P))
            if batch.noise is not None:
                time_rows, noise = batch.noise.time_SM.flatten(), batch.noise.noise_SMPC.flatten(0, 1)
            else:
                time_rows, noise = draw_noise(self.head.config, bits_RPC.shape[0], generator, bits_RPC.device)
            time_rows, noise = time_rows.to(hidden_FD.device), noise.to(hidden_FD.device)
            vision_rows, predicted = self.head.predict_at(bits_RPC, cond_RPD, time_rows, noise)
            vision = vision_rows.mean()
            repeats = len(predicted) // len(bits_RPC)
            right_rows = (predicted.detach() > 0) == (bits_RPC > 0).repeat(repeats, 1, 1)
        total = vision + text_weight * text
        return TrainingLosses(total, vision, text, vision_rows, text_rows, time_rows, predicted, right_rows)

    def conditions(self, batch: TrainingBatch, attention: Attention = "dense") -> Tensor:
        """(R,P,D) what the head gets for every predicted block; flips are those of the noise that the batch brings."""
        return self._conditions(self.hidden(batch, attention=attention).flatten(0, 1), batch)

    def _conditions(self, hidden_FD: Tensor, batch: TrainingBatch) -> Tensor:
        row_G, col_G = batch.image_row_N[batch.generated_K], batch.image_col_N[batch.generated_K]
        place_GD = sincos_2d(row_G, col_G, hidden_FD.shape[-1], hidden_FD.dtype, batch.side)
        return (hidden_FD[batch.predict_index_K] + place_GD).unflatten(0, (-1, self.block_size))

    def hidden(
        self,
        batch: TrainingBatch,
        generator: torch.Generator | None = None,
        flip_max: float = 0.0,
        attention: Attention = "dense",
    ) -> Tensor:
        """(B,L,D) hidden states of the backbone under the block-causal mask."""
        return self.backbone(self.inputs(batch, generator, flip_max), position_BL=batch.position_BL, mask=_mask(batch, attention))

    def inputs(self, batch: TrainingBatch, generator: torch.Generator | None = None, flip_max: float = 0.0) -> Tensor:
        """(B,L,D) inputs of the backbone: token embeddings, and image tokens at their places, generated ones with
        flips.
        """
        embeds_BLD = self.backbone.embed(batch.ids_BL)
        if not batch.image_index_N.numel():
            return embeds_BLD
        bits_NC = batch.image_bits_NC
        if batch.predict_index_K.numel():
            clean_GC = bits_NC[batch.generated_K]
            if batch.noise is not None:
                flipped_GC = torch.where(batch.noise.flipped_NC, -clean_GC, clean_GC)
            else:
                flipped_GC = perturb_bits(clean_GC, flip_max, generator)
            bits_NC = bits_NC.index_copy(0, batch.generated_K, flipped_GC)
        image_ND = self.embed_image(bits_NC, batch.image_row_N, batch.image_col_N, batch.side)
        embeds_FD = embeds_BLD.flatten(0, 1).index_copy(0, batch.image_index_N, image_ND.to(embeds_BLD.dtype))
        return embeds_FD.view_as(embeds_BLD)


def _mask(batch: TrainingBatch, attention: Attention) -> Tensor | BlockMask:
    if attention == "dense":
        return dense_mask(batch.doc_BL, batch.block_BL)
    if attention == "flex":
        B, L = batch.doc_BL.shape
        mask_mod = flex_mask_mod(batch.doc_BL, batch.block_BL)
        return create_block_mask(mask_mod, B, None, L, L, device=batch.doc_BL.device)
    raise ValueError(f"attention must be 'dense' or 'flex', got {attention!r}")
