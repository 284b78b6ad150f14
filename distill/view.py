"""The same documents, pictures and noise, laid out for the teacher's smaller patches.

A student's patch of kp × kp tokens is k × k sub-patches, each a patch of the teacher. What the student sees of a patch at time t,
x_t = t·x + (1 − t)·ε, the teacher sees sub-patch by sub-patch: the same numbers in another order.

N image tokens in the batch, S noise draws per block, P tokens per block of the student, T of the teacher, C bits per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitdance.sequence.batch import ImagePiece, TextPiece, TrainingBatch, build_batch
from bitdance.sequence.noise import ImageNoise
from bitdance.sequence.patches import patch_side
from bitdance.sequence.prompt import SpecialTokens
from stages.recipes.generator.documents import Example


@dataclass
class TeacherView:
    """`batch` is laid out for blocks of T tokens, without bits and noise; its image token j is the student's `order_N[j]`."""

    batch: TrainingBatch
    order_N: Tensor
    T: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherView":
        order_N = self.order_N.to(device, non_blocking=non_blocking)
        return TeacherView(self.batch.to(device, non_blocking), order_N, self.T)

    def pin_memory(self) -> "TeacherView":
        return TeacherView(self.batch.pin_memory(), self.order_N.pin_memory(), self.T)

    def seen(self, student: TrainingBatch, flipped: bool = False) -> TrainingBatch:
        """The teacher's batch with the student's bits, all of them true or `flipped` as the student sees them, and its times and
        noise. It predicts no text."""
        noise = student.noise
        assert noise is not None, "training examples bring their noise"
        P = noise.noise_SMPC.shape[2]
        bits_NC = student.image_bits_NC[self.order_N]
        time_SN = noise.time_SM.repeat_interleave(P, dim=1)[:, self.order_N]
        noise_SNC = noise.noise_SMPC.flatten(1, 2)[:, self.order_N]
        wrong_NC = noise.flipped_NC[self.order_N] if flipped else torch.zeros_like(bits_NC, dtype=torch.bool)
        own = ImageNoise(wrong_NC, time_SN[:, :: self.T].contiguous(), noise_SNC.unflatten(1, (-1, self.T)))
        no_text = {"label_ids_T": self.batch.label_ids_T[:0], "label_index_T": self.batch.label_index_T[:0]}
        return replace(self.batch, image_bits_NC=bits_NC, noise=own, **no_text)

    def as_student(self, rows_KTC: Tensor, S: int, P: int) -> Tensor:
        """Rows of the teacher's blocks, (S·N/T, T, C), as rows of the student's, (S·N/P, P, C); C numbers of whatever kind."""
        own_SNC = rows_KTC.unflatten(0, (S, -1)).flatten(1, 2)
        student_SNC = torch.empty_like(own_SNC)
        student_SNC[:, self.order_N.to(own_SNC.device)] = own_SNC
        return student_SNC.unflatten(1, (-1, P)).flatten(0, 1)


def teacher_view(
    examples: Sequence[Example],
    student: TrainingBatch,
    T: int,
    special: SpecialTokens,
    packed: dict[str, int],
    text: Sequence[int] | None = None,
) -> TeacherView:
    """The view of a teacher of T tokens per block, with its own special tokens, on the `examples`, of which `student` was
    made. `packed` is what `build_batch` takes to pack rows; `text` are ids in the place of every prompt. ValueError for a side
    that the teacher has no token for."""
    documents: list[list[TextPiece | ImagePiece]] = []
    for example in examples:
        pieces: list[TextPiece | ImagePiece] = []
        for piece in example.pieces:
            if isinstance(piece, TextPiece):
                pieces.append(TextPiece(piece.ids if text is None else text))
            else:
                pieces.append(ImagePiece(piece.bits_Chw))
        documents.append(pieces)
    batch = build_batch(documents, patch_side(T), special, **packed)
    return TeacherView(batch, _matching(_positions(batch), _positions(student)), T)


def _positions(batch: TrainingBatch) -> Tensor:
    """(N,) of each image token a number that tells picture, row and column."""
    side = 1 << 16
    return (batch.image_N * side + batch.image_row_N) * side + batch.image_col_N


def _matching(teacher_N: Tensor, student_N: Tensor) -> Tensor:
    """(N,) where the places of the teacher's tokens stand among the student's."""
    sorted_N, by_place_N = student_N.sort()
    order_N = by_place_N[torch.searchsorted(sorted_N, teacher_N)]
    assert torch.equal(student_N[order_N], teacher_N), "both batches hold the same pictures"
    return order_N
