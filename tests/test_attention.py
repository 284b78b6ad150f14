"""flex_attention == SDPA with the dense mask, on rows of several of flex's blocks of 128, where it skips the empty ones."""

import dataclasses

import pytest
import torch
from tiny_model import random_bits, tiny_model
from torch.nn.attention.flex_attention import create_block_mask

from bitdance.sequence.batch import Document, ImagePiece, TextPiece, TrainingBatch, build_batch
from bitdance.sequence.mask import flex_mask_mod

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
MODEL = tiny_model()


def text(count: int, seed: int) -> TextPiece:
    return TextPiece((5 + torch.randint(200, (count,), generator=torch.Generator().manual_seed(seed))).tolist(), predict=True)


def documents() -> list[Document]:
    """Pictures of six sizes, wide and high; text before and behind; a picture that is read and one that is drawn."""
    return [
        [text(9, 0), ImagePiece(random_bits(12, 12, 0)), text(3, 1)],
        [text(40, 2), ImagePiece(random_bits(4, 12, 1))],
        [ImagePiece(random_bits(6, 6, 2), generated=False), text(17, 3), ImagePiece(random_bits(10, 4, 3))],
        [text(150, 4)],
        [text(5, 5), ImagePiece(random_bits(2, 2, 4)), text(30, 6), ImagePiece(random_bits(8, 10, 5))],
    ]


def packed() -> TrainingBatch:
    batch = build_batch(documents(), 2, MODEL.special, token_budget=512, multiple_of=128)
    assert batch.ids_BL.shape[1] >= 384 and batch.ids_BL.shape[0] == 2
    return batch


@torch.no_grad()
def test_flex_equals_dense_over_many_blocks() -> None:
    batch = packed()
    real = batch.doc_BL >= 0
    dense, flex = (MODEL.hidden(batch, attention=attention)[real] for attention in ("dense", "flex"))
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-5)


def test_flex_skips_blocks_here() -> None:
    """Otherwise the test above would say nothing about skipping; blocks inside one document are taken as a whole."""
    batch = packed()
    rows, length = batch.doc_BL.shape
    made = create_block_mask(flex_mask_mod(batch.doc_BL, batch.block_BL), rows, None, length, length, device="cpu")
    visited = made.to_dense().flatten(1).bool()
    assert length // 128 >= 3 and 0 < visited.float().mean() < 0.8


@torch.no_grad()
@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("changed", range(5))
def test_changing_a_document_moves_no_other(attention: str, changed: int) -> None:
    """One token of text, or one bit of a picture: every hidden state of the other documents stays, bit for bit."""
    batch = packed()
    before = MODEL.hidden(batch, attention=attention)
    flat = (batch.doc_BL == changed).flatten()
    pictures = flat[batch.image_index_N]
    ids_BL, bits_NC = batch.ids_BL.clone(), batch.image_bits_NC.clone()
    if pictures.any():
        bits_NC[int(pictures.nonzero()[0]), 0] *= -1
    else:
        ids_BL.view(-1)[int(flat.nonzero()[0])] = 7
    after = MODEL.hidden(dataclasses.replace(batch, ids_BL=ids_BL, image_bits_NC=bits_NC), attention=attention)
    moved = (after != before).any(-1)
    assert not moved[batch.doc_BL != changed].any()
    assert moved[batch.doc_BL == changed].any()
