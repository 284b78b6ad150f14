"""Attention of the picture networks and the heads: what training on a processor spells out equals torch's fused kernel."""

import pytest
import torch

from bitdance.heads.attend import SHORT, attend, quick_by_hand


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


@pytest.mark.parametrize("S", [9, SHORT, SHORT + 1])
def test_training_inside_autocast_is_as_exact_as_its_numbers(S: int) -> None:
    parts = _parts(S, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*parts)
    assert out.dtype == torch.bfloat16
    expected = _by_hand(*parts, None)
    assert float((out.detach().float() - expected.detach()).norm() / expected.detach().norm()) < 0.01


def test_by_hand_in_training_alone() -> None:
    q, k, _ = _parts(SHORT, torch.float32)
    assert quick_by_hand(q, k) and not quick_by_hand(q, torch.cat([k, k[:, :, :1]], dim=2)) and not quick_by_hand(q.detach(), k)
    with torch.no_grad():
        assert not quick_by_hand(q, k)


def test_a_row_that_sees_nothing_has_numbers_and_gradients() -> None:
    parts, mask = _parts(5, torch.bfloat16), torch.zeros(5, 5, dtype=torch.bool)
    mask[1:] = True
    out = attend(*parts, mask)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out[:, 1:].float().sum(), parts))


def test_bfloat16_stays_bfloat16() -> None:
    parts = _parts(9, torch.bfloat16)
    out = attend(*parts)
    assert out.dtype == torch.bfloat16
    assert {grad.dtype for grad in torch.autograd.grad(out.float().sum(), parts)} == {torch.bfloat16}
