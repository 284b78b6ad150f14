"""Documents → one training batch: pieces of text and images laid out in rows, padded or packed, with all index tensors.

A generated image is `vision_start res_h │ res_w query_1 … query_{P-1} │ block 1 │ … │ block M │ vision_end`, with a
bar before each block; an input image is `vision_start res_h res_w tokens vision_end`, all of it causal.

B rows, L sequence, N image tokens in the whole batch, K predicted image tokens, T predicted text tokens, C bits per
token, P tokens per block, M blocks of an image, R of all generated images, S noise draws per block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdance.sequence.noise import ImageNoise
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.prompt import SpecialTokens, vision_prefix_ids


@dataclass(frozen=True)
class TextPiece:
    """Token ids. With `predict`, each of them that has a token before it in its document is a target of the text
    loss, and so is the `vision_start` of a generated image that follows directly.
    """

    ids: Sequence[int]
    predict: bool = False


@dataclass(frozen=True)
class ImagePiece:
    """±1 bits (C,h,w). `generated`: the model learns to predict it; otherwise it is an input, read causally.

    `noise` are the random numbers of its loss, drawn ahead; in a batch either all generated images have them or none.
    """

    bits_Chw: Tensor
    generated: bool = True
    noise: ImageNoise | None = None


Document = Sequence[TextPiece | ImagePiece]


@dataclass
class TrainingBatch:
    """What `BitDanceModel.forward` reads. Indices are flat, into rows × positions; every list runs in their order.

    Whatever decides the shape of a tensor is a number of the host or an index, never a mask: a step reads nothing of its device.
    """

    ids_BL: Tensor  # token ids; 0 at image tokens and padding
    doc_BL: Tensor  # index into the list of documents; -1 is padding
    block_BL: Tensor  # block of the position, unique within its row; -1 is causal
    position_BL: Tensor  # 1-D position, from 0 in each document
    image_index_N: Tensor  # where the image tokens stand
    image_bits_NC: Tensor  # their clean bits
    image_row_N: Tensor  # their place in the token grid
    image_col_N: Tensor
    image_N: Tensor  # which image of the documents, in the order given, the token belongs to
    generated_K: Tensor  # which of the N image tokens the model predicts
    predict_index_K: Tensor  # where the hidden state of each generated token stands: one block earlier
    label_index_T: Tensor  # where the hidden state of each predicted text token stands: one position earlier
    label_ids_T: Tensor
    noise: ImageNoise | None = None  # of all generated images, one after the other
    side: int | None = None  # no image has more rows or columns of tokens; None: not known to the host
    spans: tuple[slice, ...] = ()  # of each image of the documents, in the order given: where its tokens stand among the N

    @property
    def tokens(self) -> int:
        """Positions that are no padding."""
        return int((self.doc_BL >= 0).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TrainingBatch":
        """This batch on `device`."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TrainingBatch":
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> "TrainingBatch":
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: change(part) for name, part in parts.items() if isinstance(part, Tensor | ImageNoise)}
        return TrainingBatch(**{**parts, **moved})


def build_batch(
    documents: Sequence[Document],
    p: int,
    special: SpecialTokens,
    pad_to: int | None = None,
    token_budget: int | None = None,
    multiple_of: int | None = None,
) -> TrainingBatch:
    """Lay `documents` out for a model with patch side `p`.

    Without `token_budget`, one document per row, rows padded to the longest (or to `pad_to`). With it, documents
    share rows of exactly `token_budget` positions: each goes, in the given order, into the first row with room for
    it. With `multiple_of` as well, `token_budget` is only the most a row may hold: documents are spread evenly over the number
    of rows that leaves least to pad, and rows are as long as the longest of them, rounded up to that multiple.
    Raises ValueError for an empty batch, a document that does not fit, images of different bits per token, and
    whatever `PatchPlan` and `vision_prefix_ids` refuse. Source: published checkpoints (case `packed`).
    """
    if not documents or not all(len(document) for document in documents):
        raise ValueError("a batch needs at least one document, and a document at least one piece")
    laid = [_lay_out(document, p, special) for document in documents]
    lengths = [layout.ids.size for layout in laid]
    rows, length = _assign_rows(lengths, pad_to, token_budget, multiple_of)
    images_before = np.cumsum([0, *(len(layout.images) for layout in laid)])

    shape = (len(rows), length)
    ids_BL = np.zeros(shape, np.int64)
    position_BL = np.zeros(shape, np.int64)
    doc_BL, block_BL = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    image, row, col, number, generated, predict, labels = [], [], [], [], [], [], []
    pictures: list[Tensor] = []
    noise: list[ImageNoise | None] = []
    spans: list[slice] = [slice(0)] * int(images_before[-1])
    tokens = 0
    for r, members in enumerate(rows):
        start, blocks = 0, 0
        for d in members:
            layout, flat = laid[d], r * length + start
            span = slice(start, start + layout.ids.size)
            ids_BL[r, span] = layout.ids
            doc_BL[r, span] = d
            position_BL[r, span] = np.arange(layout.ids.size)
            block_BL[r, span] = np.where(layout.block >= 0, layout.block + blocks, -1)
            for k, (offset, piece) in enumerate(layout.images):
                template = _template(*piece.bits_Chw.shape[1:], p, piece.generated, special)
                image.append(template.image + (flat + offset))
                row.append(template.row)
                col.append(template.col)
                number.append(np.full(template.image.size, images_before[d] + k))
                generated.append(np.full(template.image.size, piece.generated))
                predict.append(template.predict + (flat + offset))
                spans[images_before[d] + k] = slice(tokens, tokens := tokens + template.image.size)
                pictures.append(piece.bits_Chw)
                if piece.generated:
                    noise.append(piece.noise)
            labels.append(layout.label_target + flat)
            start += layout.ids.size
            blocks += layout.num_blocks
    label_T = _joined(labels)
    return TrainingBatch(
        ids_BL=torch.from_numpy(ids_BL),
        doc_BL=torch.from_numpy(doc_BL),
        block_BL=torch.from_numpy(block_BL),
        position_BL=torch.from_numpy(position_BL),
        image_index_N=torch.from_numpy(_joined(image)),
        image_bits_NC=_ordered_bits(pictures, p),
        image_row_N=torch.from_numpy(_joined(row)),
        image_col_N=torch.from_numpy(_joined(col)),
        image_N=torch.from_numpy(_joined(number)),
        generated_K=torch.from_numpy(np.flatnonzero(_joined(generated))),
        predict_index_K=torch.from_numpy(_joined(predict)),
        label_index_T=torch.from_numpy(label_T - 1),
        label_ids_T=torch.from_numpy(ids_BL.reshape(-1)[label_T]),
        noise=ImageNoise.joined(noise),
        side=max((side for picture in pictures for side in picture.shape[1:]), default=0),
        spans=tuple(spans),
    )


@dataclass(frozen=True)
class _Template:
    """An image of one size, positions relative to its `vision_start`."""

    ids: np.ndarray
    block: np.ndarray
    image: np.ndarray  # positions of the image tokens
    row: np.ndarray
    col: np.ndarray
    predict: np.ndarray  # positions whose hidden states predict the image tokens; empty for an input image
    num_blocks: int


@lru_cache(maxsize=1024)
def _template(h: int, w: int, p: int, generated: bool, special: SpecialTokens) -> _Template:
    plan = PatchPlan(h, w, p)
    N, P = h * w, p * p
    prefix = vision_prefix_ids(special, h, w, P if generated else 1)
    ids = np.array([*prefix, *[0] * N, special.vision_end], np.int64)
    block = np.full(ids.size, -1, np.int64)
    predict = np.empty(0, np.int64)
    num_blocks = 0
    if generated:
        block[2 : 2 + P + N] = np.arange(P + N) // P  # from res_w on
        predict = np.arange(2, 2 + N)
        num_blocks = 1 + plan.num_blocks
    row_N, col_N = plan.coordinates()
    image = np.arange(len(prefix), len(prefix) + N)
    return _Template(ids, block, image, row_N.numpy(), col_N.numpy(), predict, num_blocks)


@dataclass(frozen=True)
class _Layout:
    """One document, positions relative to its first token."""

    ids: np.ndarray
    block: np.ndarray
    label_target: np.ndarray  # positions of predicted text tokens
    images: list[tuple[int, ImagePiece]]  # (position of vision_start, image)
    num_blocks: int


def _lay_out(document: Document, p: int, special: SpecialTokens) -> _Layout:
    ids, block, targets = [], [], []
    images: list[tuple[int, ImagePiece]] = []
    start, num_blocks, after_predicted_text = 0, 0, False
    for piece in document:
        if isinstance(piece, TextPiece):
            piece_ids = np.asarray(piece.ids, np.int64).reshape(-1)
            ids.append(piece_ids)
            block.append(np.full(piece_ids.size, -1, np.int64))
            if piece.predict:
                targets.append(np.arange(max(start, 1), start + piece_ids.size))  # nothing predicts a first token
            after_predicted_text = piece.predict and start + piece_ids.size > 0
        else:
            if piece.bits_Chw.ndim != 3:
                raise ValueError(f"an image piece needs bits of shape (C,h,w), got {tuple(piece.bits_Chw.shape)}")
            template = _template(*piece.bits_Chw.shape[1:], p, piece.generated, special)
            ids.append(template.ids)
            block.append(np.where(template.block >= 0, template.block + num_blocks, -1))
            images.append((start, piece))
            if piece.generated and after_predicted_text:
                targets.append(np.array([start]))
            num_blocks += template.num_blocks
            after_predicted_text = False
        start += ids[-1].size
    return _Layout(np.concatenate(ids), np.concatenate(block), _joined(targets), images, num_blocks)


def _assign_rows(
    lengths: list[int], pad_to: int | None, token_budget: int | None, multiple_of: int | None
) -> tuple[list[list[int]], int]:
    """Documents of each row, and the length of a row."""
    if multiple_of is not None and token_budget is None:
        raise ValueError("multiple_of rounds the length of packed rows; give token_budget, the most that a row may hold")
    if pad_to is not None and token_budget is not None:
        raise ValueError("pad_to is for one document per row and token_budget for packed rows; give one of them")
    longest = max(lengths)
    if not min(lengths):
        raise ValueError(f"document {lengths.index(0)} has no tokens at all")
    limit = token_budget if token_budget is not None else pad_to
    if limit is not None and longest > limit:
        raise ValueError(
            f"document {lengths.index(longest)} has {longest} tokens, more than the {limit} of a row; "
            "use a longer row, a shorter prompt or a smaller image"
        )
    if token_budget is None:
        return [[d] for d in range(len(lengths))], limit or longest
    if multiple_of is not None:
        return _even_rows(lengths, token_budget, multiple_of)
    rows: list[list[int]] = []
    room: list[int] = []
    for d, length in enumerate(lengths):
        r = next((r for r, left in enumerate(room) if left >= length), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(token_budget)
        rows[r].append(d)
        room[r] -= length
    return rows, token_budget


def _even_rows(lengths: list[int], most: int, multiple_of: int) -> tuple[list[list[int]], int]:
    """Longest document first, each into the emptiest row; of the numbers of rows that hold all, the one with fewest positions."""
    by_length = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    best: tuple[list[list[int]], int] = [[d] for d in by_length], -(-max(lengths) // multiple_of) * multiple_of
    for count in range(len(lengths) - 1, -(-sum(lengths) // most) - 1, -1):
        rows: list[list[int]] = [[] for _ in range(count)]
        used = [0] * count
        for d in by_length:
            r = used.index(min(used))
            rows[r].append(d)
            used[r] += lengths[d]
        length = -(-max(used) // multiple_of) * multiple_of
        if max(used) <= most and count * length <= len(best[0]) * best[1]:
            best = rows, length
    return [sorted(row) for row in best[0]], best[1]


def _ordered_bits(pictures: list[Tensor], p: int) -> Tensor:
    """(N,C) float32 bits of all pictures, each in prediction order; pictures of one size are ordered together."""
    if not pictures:
        return torch.empty(0, 0)
    widths = sorted({picture.shape[0] for picture in pictures})
    if len(widths) > 1:
        raise ValueError(f"images of one batch must have the same number of bits per token, got {widths}")
    groups: dict[tuple[int, int], list[int]] = {}
    for k, picture in enumerate(pictures):
        groups.setdefault((picture.shape[1], picture.shape[2]), []).append(k)
    ordered: list[Tensor] = [torch.empty(0)] * len(pictures)
    for (h, w), members in groups.items():
        stacked_BChw = torch.stack([pictures[k] for k in members]).float()
        for k, bits_NC in zip(members, PatchPlan(h, w, p).order(stacked_BChw).unbind(0), strict=True):
            ordered[k] = bits_NC
    return torch.cat(ordered)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
