"""Packed rows hold what they may, and little else: at least 95 % of their positions are real tokens."""

import pytest
import torch
from tiny_model import tiny_text_tokenizer

from bitdance.folder.sizes import SizeRule, sizes_at
from bitdance.sequence.batch import ImagePiece, TextPiece, build_batch
from bitdance.sequence.prompt import SpecialTokens

SPECIAL = SpecialTokens.from_tokenizer(tiny_text_tokenizer())


def document(tokens: int, side: int = 2) -> list[TextPiece | ImagePiece]:
    return [TextPiece([1] * tokens), ImagePiece(torch.ones(1, side, side))]


def lengths(count: int, seed: int) -> list[int]:
    return (5 + torch.randint(60, (count,), generator=torch.Generator().manual_seed(seed))).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_there_once_and_rows_stay_within_the_budget(seed: int) -> None:
    texts = lengths(23, seed)
    batch = build_batch([document(n) for n in texts], 1, SPECIAL, token_budget=150, multiple_of=8)
    length = batch.ids_BL.shape[1]
    assert length <= 152 and length % 8 == 0
    assert batch.tokens == sum(n + 8 for n in texts)
    for d, n in enumerate(texts):
        inside = (batch.doc_BL == d).nonzero()
        assert len(inside) == n + 8 and len(set(inside[:, 0].tolist())) == 1  # whole, in one row
        assert inside[:, 1].tolist() == list(range(int(inside[0, 1]), int(inside[0, 1]) + n + 8))  # in one piece
        assert torch.equal(batch.position_BL[batch.doc_BL == d], torch.arange(n + 8))


def test_a_single_long_document_gets_a_row_and_too_long_a_one_is_refused() -> None:
    batch = build_batch([document(100), document(3), document(3)], 1, SPECIAL, token_budget=110, multiple_of=1)
    assert batch.ids_BL.shape == (2, 108) or batch.ids_BL.shape == (1, 130)
    with pytest.raises(ValueError, match="document 1 has 120 tokens, more than the 110 of a row"):
        build_batch([document(3), document(112)], 1, SPECIAL, token_budget=110, multiple_of=1)


def test_rounding_without_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="give token_budget"):
        build_batch([document(3)], 1, SPECIAL, multiple_of=8)


@pytest.mark.parametrize(("mix", "batch_size"), [({256: 2, 512: 7, 1024: 1}, 10), ({512: 1, 1024: 1}, 4), ({64: 9, 96: 1}, 20)])
def test_mixed_resolutions_fill_their_rows(mix: dict[int, int], batch_size: int) -> None:
    """The published mix at the published grid, and the bundled model's; captions of 10 to 120 tokens, all aspect ratios."""
    from stages.data.mixture import spread

    downsampling, p = (16, 4) if 512 in mix else (8, 4)
    rule = SizeRule(downsampling, p, frozenset(range(1, 257)))
    resolutions = list(mix)
    pattern = spread([share / sum(mix.values()) for share in mix.values()])
    generator = torch.Generator().manual_seed(1)
    special = SpecialTokens(0, 1, 2, 3, tuple(range(10, 266)), tuple(range(300, 315)))
    real = positions = 0
    for step in range(20):
        documents = []
        for slot in range(step * batch_size, (step + 1) * batch_size):
            sizes = sizes_at(rule, resolutions[pattern[slot % len(pattern)]])
            height, width = sizes[int(torch.randint(len(sizes), (), generator=generator))]
            words = 10 + int(torch.randint(110, (), generator=generator))
            documents.append([TextPiece([1] * words), ImagePiece(torch.ones(1, height // downsampling, width // downsampling))])
        layout = {"token_budget": 12_000, "multiple_of": 128} if 512 in mix else {"token_budget": 720, "multiple_of": 8}
        batch = build_batch(documents, p, special, **layout)
        real, positions = real + batch.tokens, positions + batch.ids_BL.numel()
    print(f"{real / positions:.4f} of the positions are tokens")  # pytest -s
    assert real / positions >= 0.95
