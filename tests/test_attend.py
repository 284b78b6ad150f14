"""Attention of the picture networks: the same in every precision, the way back in float32 where that is quicker."""

import pytest
import torch

from bitdance.heads.attend import SHORT, attend


def _parts(S: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, S, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def _by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients_in_float64(masked: bool) -> None:
    parts, mask = _parts(7, torch.float64), torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    out, expected = attend(*parts, mask), _by_hand(*parts, mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(out.square().sum(), parts), torch.autograd.grad(expected.square().sum(), parts), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("S", "exact"), [(9, True), (SHORT + 1, False)])
def test_short_sequences_are_float32_inside_autocast_in_training(S: int, exact: bool) -> None:
    parts = _parts(S, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*parts)
    assert (out.dtype == torch.float32) == exact
    assert torch.allclose(out.float(), _by_hand(*parts, None), rtol=1e-5, atol=1e-6) == exact


def test_bfloat16_stays_bfloat16() -> None:
    parts = _parts(9, torch.bfloat16)
    out = attend(*parts)
    assert out.dtype == torch.bfloat16
    assert {grad.dtype for grad in torch.autograd.grad(out.float().sum(), parts)} == {torch.bfloat16}
