"""The block-causal mask == brute force from the sentence that defines it; nothing leaks from a later block."""

import dataclasses
import itertools

import pytest
import torch
from tiny_model import BITS, random_bits, tiny_model
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.mask import dense_mask, flex_mask_mod

# Compiling flex_attention is for GPUs; the CPU runs it as written, slowly, which is what these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def brute_force(doc: list[int], block: list[int]) -> list[list[bool]]:
    """A position sees the positions of its own document that are not after it or that lie in its own block; padding
    sees only itself.
    """
    L = len(doc)
    seen = [[False] * L for _ in range(L)]
    for query, key in itertools.product(range(L), repeat=2):
        if doc[query] == -1:
            seen[query][key] = query == key
        elif doc[query] == doc[key]:
            not_after = key <= query
            own_block = block[query] != -1 and block[query] == block[key]
            seen[query][key] = not_after or own_block
    return seen


def rows() -> list[tuple[list[int], list[int]]]:
    """Every mixture of text length, blocks, closing text, padding on either side, and one to three packed documents."""
    found = []
    for text, blocks, size, padding, left, documents in itertools.product(
        (0, 1, 3), (0, 1, 2), (1, 4), (0, 2), (False, True), (1, 2, 3)
    ):
        doc, block, number = [], [], 0
        for d in range(documents):
            length = text + d + blocks * size + 1
            doc += [d] * length
            block += [-1] * (text + d) + [number + n // size for n in range(blocks * size)] + [-1]
            number += blocks
        pad = [-1] * padding
        found.append((pad + doc, pad + block) if left else (doc + pad, block + pad))
    return found


def as_batch(pairs: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(doc) for doc, _ in pairs)
    return tuple(torch.tensor([pair[k] + [-1] * (longest - len(pair[k])) for pair in pairs]) for k in (0, 1))  # type: ignore[return-value]


def test_dense_mask_is_the_sentence() -> None:
    doc, block = as_batch(rows())
    expected = torch.tensor([brute_force(d, b) for d, b in zip(doc.tolist(), block.tolist(), strict=True)])
    assert torch.equal(dense_mask(doc, block), expected[:, None])


def test_flex_mask_is_the_sentence() -> None:
    doc, block = as_batch(rows())
    made = create_mask(flex_mask_mod(doc, block), doc.shape[0], 1, doc.shape[1], doc.shape[1], device="cpu")
    assert torch.equal(made, dense_mask(doc, block))


def test_no_query_is_left_without_a_key() -> None:
    doc, block = as_batch(rows())
    assert dense_mask(doc, block).any(-1).all()


def documents() -> list:
    return [
        [TextPiece([5, 6, 7], True), ImagePiece(random_bits(4, 6, 1)), TextPiece([8, 9], True)],
        [TextPiece([10]), ImagePiece(random_bits(4, 4, 2))],
        [ImagePiece(random_bits(2, 4, 3), generated=False), TextPiece([11, 12], True)],
    ]


@torch.no_grad()
@pytest.mark.parametrize("token_budget", [None, 90])
def test_flex_forward_equals_dense_forward(token_budget: int | None) -> None:
    model = tiny_model()
    batch = build_batch(documents(), 2, model.special, token_budget=token_budget)
    real = batch.doc_BL >= 0
    dense, flex = (model.hidden(batch, attention=attention)[real] for attention in ("dense", "flex"))
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-5)
    # the comparison can fail: a causal mask gives something else
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, *batch.doc_BL.shape[1:] * 2, device="cpu")
    causal = model.backbone(model.inputs(batch), position_BL=batch.position_BL, mask=block_mask)[real]
    assert (causal - dense).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("attention", ["dense", "flex"])
def test_no_leak_from_a_later_block(attention: str) -> None:
    """Changing a token of block j leaves every hidden state before block j as it was, bit for bit, and moves block j
    itself.
    """
    model = tiny_model()
    batch = build_batch(documents()[:1], 2, model.special)
    before = model.hidden(batch, attention=attention)[0]
    for j in range(6):
        for inside in (0, 3):
            bits = batch.image_bits_NC.clone()
            bits[4 * j + inside] *= -1
            after = model.hidden(dataclasses.replace(batch, image_bits_NC=bits), attention=attention)[0]
            start = int(batch.image_index_N[4 * j])
            changed = (after != before).any(-1)
            assert not changed[:start].any()
            assert changed[start : start + 4].all()


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    """Replacing one packed document leaves the hidden states of the others as they were, bit for bit."""
    model = tiny_model()
    packed = build_batch(documents(), 2, model.special, token_budget=90)
    before = model.hidden(packed)
    flipped = torch.where((packed.image_index_N < 36)[:, None], -packed.image_bits_NC, packed.image_bits_NC)
    other_ids = torch.where((packed.doc_BL == 0) & (packed.ids_BL > 0), 20, packed.ids_BL)
    after = model.hidden(dataclasses.replace(packed, image_bits_NC=flipped, ids_BL=other_ids))
    assert torch.equal(after[packed.doc_BL != 0], before[packed.doc_BL != 0])
    assert (after[packed.doc_BL == 0] != before[packed.doc_BL == 0]).any(-1).all()
    assert packed.image_bits_NC.shape[1] == BITS


@torch.no_grad()
def test_packed_equals_alone() -> None:
    model = tiny_model()
    packed = build_batch(documents(), 2, model.special, token_budget=90)
    hidden = model.hidden(packed)
    for d, document in enumerate(documents()):
        alone = build_batch([document], 2, model.special)
        torch.testing.assert_close(hidden[packed.doc_BL == d], model.hidden(alone)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model = tiny_model()
    document = documents()[:1]
    bare = model.hidden(build_batch(document, 2, model.special))
    padded = model.hidden(build_batch(document, 2, model.special, pad_to=60))
    torch.testing.assert_close(padded[:, : bare.shape[1]], bare, rtol=0, atol=1e-5)
    assert padded.isfinite().all()
