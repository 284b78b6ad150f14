"""Plans, positions and batches: what stands where, against slow code written from the description."""

import math
import time

import pytest
import torch
from tiny_model import BITS, random_bits, tiny_text_tokenizer

from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.patches import PatchPlan, patch_side
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import SpecialTokens, conditional_ids, unconditional_ids, vision_prefix_ids


@pytest.fixture(scope="module")
def special() -> SpecialTokens:
    return SpecialTokens.from_tokenizer(tiny_text_tokenizer())


@pytest.mark.parametrize(("h", "w", "p"), [(4, 4, 1), (4, 6, 2), (8, 4, 4), (2, 2, 2)])
def test_unorder_of_order_is_the_identity(h: int, w: int, p: int) -> None:
    plan = PatchPlan(h, w, p)
    x = torch.arange(2 * 3 * h * w).reshape(2, 3, h, w)
    assert torch.equal(plan.unorder(plan.order(x)), x)
    corners = [(i, j) for i in range(0, h, p) for j in range(0, w, p)]  # patches in raster order, and tokens in each of them
    patches = [x[:, :, i : i + p, j : j + p].flatten(2) for i, j in corners]
    assert torch.equal(plan.order(x), torch.cat(patches, dim=2).transpose(1, 2))
    row, col = plan.coordinates()
    assert torch.equal(plan.order(x)[0, :, 0], x[0, 0, row, col])
    assert (plan.block_size, plan.num_blocks) == (p * p, h * w // p**2)


def test_coordinates_are_the_callers_own() -> None:
    plan = PatchPlan(2, 2, 1)
    plan.coordinates()[0].fill_(7)
    assert plan.coordinates()[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("h", "w", "p"), [(4, 5, 2), (6, 8, 4), (0, 4, 2), (4, 4, 0)])
def test_a_patch_must_divide_the_grid(h: int, w: int, p: int) -> None:
    with pytest.raises(ValueError, match=f"{h}x{w}"):
        PatchPlan(h, w, p)


def test_a_patch_is_square() -> None:
    assert [patch_side(P) for P in (1, 4, 16, 64)] == [1, 2, 4, 8]
    with pytest.raises(ValueError, match="parallel_num = 8; a block is a square patch"):
        patch_side(8)


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(B,C,4,6\)"):
        PatchPlan(4, 6, 2).order(torch.zeros(1, 3, 6, 4))
    with pytest.raises(ValueError, match=r"\(B,24,C\)"):
        PatchPlan(4, 6, 2).unorder(torch.zeros(1, 20, 3))


def test_positions_follow_the_formula() -> None:
    table = sincos_2d(torch.tensor([3, 0]), torch.tensor([5, 1]), 16, torch.float64)
    for (row, col), line in zip([(3, 5), (0, 1)], table, strict=True):
        expected = []
        for place in (col, row):
            angles = [place / 10000 ** (k / 4) for k in range(4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(line, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)
    assert sincos_2d(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), 16).shape == (0, 16)
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(torch.tensor([0]), torch.tensor([0]), 6)


def described(documents, p, special):
    """Per document a list of (id, block, kind) and the labels, token by token as the description says."""
    laid = []
    for document in documents:
        tokens, blocks = [], 0
        for k, piece in enumerate(document):
            before = document[k - 1] if k else None
            if isinstance(piece, TextPiece):
                tokens += [(i, -1, "label" if piece.predict and (tokens or n) else "text") for n, i in enumerate(piece.ids)]
                continue
            _, h, w = piece.bits_Chw.shape
            prefix = vision_prefix_ids(special, h, w, p * p if piece.generated else 1)
            announced = piece.generated and isinstance(before, TextPiece) and before.predict and tokens
            tokens.append((prefix[0], -1, "label" if announced else "text"))
            tokens.append((prefix[1], -1, "text"))
            order = [(i * p + a, j * p + b) for i in range(h // p) for j in range(w // p) for a in range(p) for b in range(p)]
            rest = [(i, "text") for i in prefix[2:]] + [(0, (piece, *place)) for place in order]
            for n, (i, kind) in enumerate(rest):
                tokens.append((i, blocks + n // (p * p) if piece.generated else -1, kind))
            blocks += 1 + h * w // p**2 if piece.generated else 0
            tokens.append((special.vision_end, -1, "text"))
        laid.append(tokens)
    return laid


def assert_as_described(batch, documents, p, special, rows) -> None:
    laid = described(documents, p, special)
    L = batch.ids_BL.shape[1]
    images, generated, predict, labels = [], [], [], []
    for r, members in enumerate(rows):
        start, shift = 0, 0
        for d in members:
            tokens, span = laid[d], slice(start, start + len(laid[d]))
            assert batch.ids_BL[r, span].tolist() == [t[0] for t in tokens]
            assert batch.position_BL[r, span].tolist() == list(range(len(tokens)))
            assert batch.doc_BL[r, span].tolist() == [d] * len(tokens)
            assert batch.block_BL[r, span].tolist() == [t[1] + shift if t[1] >= 0 else -1 for t in tokens]
            shift += 1 + max(t[1] for t in tokens)
            for n, (i, _, kind) in enumerate(tokens):
                flat = r * L + start + n
                if kind == "label":
                    labels.append((flat - 1, i))
                elif kind != "text":
                    images.append((flat, kind))
                    generated.append(kind[0].generated)
                    if kind[0].generated:
                        predict.append(flat - p * p)
            start += len(tokens)
        assert (batch.doc_BL[r, start:] == -1).all() and (batch.block_BL[r, start:] == -1).all()
    assert batch.image_index_N.tolist() == [flat for flat, _ in images]
    assert batch.image_row_N.tolist() == [row for _, (_, row, _) in images]
    assert batch.image_col_N.tolist() == [col for _, (_, _, col) in images]
    assert batch.generated_K.tolist() == [n for n, predicted in enumerate(generated) if predicted]
    assert batch.predict_index_K.tolist() == predict
    places = [(row, col) for _, (_, row, col) in images]
    assert batch.side == 1 + max((max(place) for place in places), default=-1)
    assert [batch.image_N.tolist()[span] for span in batch.spans] == [
        [k] * len(batch.image_N[batch.image_N == k]) for k in range(len(batch.spans))
    ]
    assert list(zip(batch.label_index_T.tolist(), batch.label_ids_T.tolist(), strict=True)) == labels
    expected = [piece.bits_Chw[:, row, col] for _, (piece, row, col) in images]
    assert torch.equal(batch.image_bits_NC, torch.stack(expected) if expected else torch.empty(0, 0))


def mixed_documents(p: int) -> list:
    image = [
        ImagePiece(random_bits(2 * p, p, 1)),
        ImagePiece(random_bits(p, 2 * p, 2)),
        ImagePiece(random_bits(p, p, 3), False),
    ]
    return [
        [TextPiece([5, 6, 7], predict=True), image[0], TextPiece([8], predict=True)],
        [image[1]],
        [TextPiece([9]), image[2], TextPiece([10, 11], predict=True), image[0], TextPiece([12])],
        [TextPiece([], predict=True), image[0], image[1]],
        [TextPiece([13, 14, 15, 16], predict=True)],
    ]


@pytest.mark.parametrize("p", [1, 2])
def test_padded_batch(p: int, special: SpecialTokens) -> None:
    documents = mixed_documents(p)
    batch = build_batch(documents, p, special)
    assert_as_described(batch, documents, p, special, [[d] for d in range(5)])
    longest = batch.ids_BL.shape[1]
    assert longest == max(len(tokens) for tokens in described(documents, p, special))
    wider = build_batch(documents, p, special, pad_to=longest + 9)
    assert wider.ids_BL.shape == (5, longest + 9)
    assert_as_described(wider, documents, p, special, [[d] for d in range(5)])


def test_packed_batch_fills_rows_first_fit(special: SpecialTokens) -> None:
    documents = mixed_documents(2)
    lengths = [len(tokens) for tokens in described(documents, 2, special)]
    assert lengths == [19, 15, 27, 30, 4]
    batch = build_batch(documents, 2, special, token_budget=40)
    assert batch.ids_BL.shape == (3, 40)
    assert_as_described(batch, documents, 2, special, [[0, 1, 4], [2], [3]])


def test_the_published_sequence(special: SpecialTokens) -> None:
    """Prompt, vision_start, height, width, queries, blocks, vision_end; the hidden states of block m predict block
    m+1.
    """
    tokenizer = tiny_text_tokenizer()
    prompt = conditional_ids(tokenizer, "a red cube")
    batch = build_batch([[TextPiece(prompt, predict=True), ImagePiece(random_bits(4, 2))]], 2, special)
    t = len(prompt)
    prefix = vision_prefix_ids(special, 4, 2, 4)
    assert batch.ids_BL[0].tolist() == prompt + prefix + [0] * 8 + [special.vision_end]
    assert batch.block_BL[0].tolist() == [-1] * (t + 2) + [0] * 4 + [1] * 4 + [2] * 4 + [-1]
    assert batch.predict_index_K.tolist() == list(range(t + 2, t + 10))
    assert batch.label_ids_T.tolist() == prompt[1:] + [special.vision_start]


def test_errors_name_what_is_wrong(special: SpecialTokens) -> None:
    good = [TextPiece([1, 2, 3])]
    for documents, kwargs, message in [
        ([], {}, "at least one document"),
        ([[]], {}, "at least one piece"),
        ([[TextPiece([])]], {}, "no tokens"),
        ([good], {"pad_to": 2}, "document 0 has 3 tokens"),
        ([good, good], {"token_budget": 2}, "more than the 2"),
        ([good], {"token_budget": 4, "pad_to": 4}, "one of them"),
        ([[ImagePiece(random_bits(3, 4))]], {}, "3x4"),
        ([[ImagePiece(random_bits(20, 4))]], {}, "res_12"),
        ([[ImagePiece(torch.ones(1, 6, 4, 4))]], {}, r"\(C,h,w\)"),
        ([[ImagePiece(torch.ones(5, 2, 2))], [ImagePiece(random_bits(2, 2))]], {}, r"\[5, 6\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_batch(documents, 2, special, **kwargs)


def test_bits_of_any_dtype_and_device_moves(special: SpecialTokens) -> None:
    batch = build_batch([[ImagePiece(random_bits(2, 2).to(torch.int8))]], 2, special)
    assert batch.image_bits_NC.dtype == torch.float32 and batch.image_bits_NC.shape == (4, BITS)
    assert batch.to("meta").ids_BL.device.type == "meta"


def test_a_training_batch_is_quick_to_build(special: SpecialTokens) -> None:
    """64 documents of about 100 tokens; 5 ms of CPU time on a desktop core, and the bound leaves room for a slow one."""
    prompt = conditional_ids(tiny_text_tokenizer(), "a red cube on a table")
    other = unconditional_ids(tiny_text_tokenizer())
    documents = [[TextPiece(prompt if k % 10 else other, True), ImagePiece(random_bits(8, 8, k))] for k in range(64)]
    build_batch(documents, 4, special)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        build_batch(documents, 4, special)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
