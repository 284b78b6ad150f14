"""flash-attn-4 serves training where it can and is right; where it is not, torch's own kernel does, and a warning says so."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from bitdance.cli import doctor
from bitdance.networks import attention
from bitdance.networks.attention import _Flex, _outputs, without_flash
from bitdance.sequence.mask import dense_mask, flex_mask_mod


def plain(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, enable_gqa: bool) -> Tensor:
    """With a dense mask: flex_attention has no gradient on a CPU."""
    place = torch.arange(query.shape[2], device=query.device)
    zero, more = place.new_zeros(()), query.shape[1] // key.shape[1]
    seen = block_mask.mask_mod(zero, zero, place[:, None], place[None, :])
    key, value = (part.repeat_interleave(more, dim=1) for part in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)


class Wrong(torch.autograd.Function):
    """The right output, and a gradient for the values that is twice what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def right(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return plain(query, key, value, **options) * (1 + 1e-3)


def wrong_gradient(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return plain(query, key, Wrong.apply(value), **options)


def broken(*tensors: Tensor, **options: Any) -> Tensor:
    raise NotImplementedError("block mask without full blocks is not supported yet")


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], _Flex]:
    """With a stand-in for FLASH and nothing compiled, as on a GPU with the package."""

    def made(flash: Callable[..., Tensor], reason: str = "") -> _Flex:
        monkeypatch.setattr(attention, "without_flash", lambda device, dtype: reason)
        found = _Flex()
        found.plain, found.flash = plain, flash
        return found

    return made


def call(flex: Any, length: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, length, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2))
    ids = torch.zeros(1, length, dtype=torch.long)
    mask = create_block_mask(flex_mask_mod(ids, ids - 1), 1, None, length, length, device="cpu")
    return flex(query, key, value, block_mask=mask, enable_gqa=True)


def test_a_kernel_that_agrees_serves_and_is_compared_once(flex: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(attention, "_outputs", lambda *args: compared.append(args[-3:]) or _outputs(*args))
    made = flex(right)
    with warnings.catch_warnings(action="error", category=UserWarning):
        first, second = call(made), call(made, 256)
    assert torch.equal(first, call(right)) and not torch.equal(first, call(plain))
    assert torch.equal(second, call(right, 256)) and compared == [(4, 2, 16)] * 2  # once, of either kernel


@pytest.mark.parametrize(
    ("kernel", "message"), [(wrong_gradient, r"gradients are off by 1 of their size"), (broken, "not supported yet")]
)
def test_a_kernel_with_wrong_gradients_or_none_never_serves(flex: Any, kernel: Any, message: str) -> None:
    made = flex(kernel)
    with pytest.warns(UserWarning, match=f"flash-attn-4 is installed and not used.*{message}"):
        found = call(made)
    assert torch.equal(found, call(plain))
    with warnings.catch_warnings(action="error", category=UserWarning):
        call(made)  # said once


def test_a_length_that_it_refuses_later_is_served_all_the_same(flex: Any) -> None:
    def only_short(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[2] == 256:
            raise RuntimeError("dynamic shapes")
        return right(query, key, value, **options)

    made = flex(only_short)
    assert torch.equal(call(made), call(right))
    with pytest.warns(UserWarning, match="dynamic shapes"):
        assert torch.equal(call(made, 256), call(plain, 256))
    assert torch.equal(call(made), call(plain))


def test_where_it_cannot_serve_it_is_not_even_tried(flex: Any) -> None:
    made = flex(broken, "flash-attn-4 is not installed")
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert torch.equal(call(made), call(plain))


def test_comparing_leaves_a_checkpointed_layer_alone(flex: Any) -> None:
    """Tensors kept for the comparison are not those that the layer keeps and computes again."""
    made, x = flex(right), torch.randn(1, 4, 128, 16, requires_grad=True)
    ids = torch.zeros(1, 128, dtype=torch.long)
    mask = create_block_mask(flex_mask_mod(ids, ids - 1), 1, None, 128, 128, device="cpu")
    layer = lambda q: made(q, x.detach(), x.detach(), block_mask=mask, enable_gqa=True)  # noqa: E731
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, half = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    found: dict[str, Any] = {"spec": None}
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: found["spec"])
    assert without_flash(cuda, half) == "flash-attn-4 is not installed"
    found["spec"] = "here"
    for major, served in ((8, False), (9, True), (10, True), (12, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert (without_flash(cuda, half) == "") is served
    assert "compute capability 9 or 10" in without_flash(cpu, half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "more than 16 bits" in without_flash(cuda, torch.float32)


def test_doctor_says_whether_it_serves_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, shown in (("flash-attn-4 is not installed", "(no FLASH: flash-attn-4 is not installed)"), ("", "with FLASH")):
        monkeypatch.setattr(attention, "without_flash", lambda device, dtype, reason=reason: reason)
        assert f"flex_attention {shown}" in doctor._attention()


def test_the_row_that_both_are_compared_on_has_all_kinds_of_blocks() -> None:
    """Full ones, empty ones and partial ones of flex's 128 × 128; text, pictures and padding."""
    masks = []

    def look(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, **options: Any) -> Tensor:
        masks.append(block_mask)
        return plain(query, key, value, block_mask=block_mask, **options)

    _outputs(look, torch.device("cpu"), torch.float32, 2, 1, 16)
    place, mask = torch.arange(512), masks[0]
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :])
    tiles = seen.unflatten(0, (4, 128)).unflatten(2, (4, 128)).transpose(1, 2).flatten(2).float().mean(-1)
    assert (tiles == 0).any() and ((tiles > 0) & (tiles < 1)).any()
    assert seen.diagonal(1).any(), "a block of a picture sees what comes after"


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(40, 8, 128), (8, 4, 64), (8, 8, 64)])
def test_on_a_gpu_flash_equals_the_plain_kernel_and_both_the_dense_mask(heads: int, key_heads: int, width: int) -> None:
    """The published shape, and that of the bundled model. Skipped without flash-attn-4 and on older GPUs."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    flex = attention._compiled_flex()
    wanted = _outputs(plain, device, dtype, heads, key_heads, width)
    triton = _outputs(flex.plain, device, dtype, heads, key_heads, width)
    assert all(float((a - b).norm() / b.norm()) < 0.02 for a, b in zip(triton, wanted, strict=True))
    if reason := without_flash(device, dtype):
        pytest.skip(reason)
    flash = _outputs(flex.flash, device, dtype, heads, key_heads, width)
    assert all(float((a - b).norm() / b.norm()) < 0.02 for a, b in zip(flash, wanted, strict=True))


def test_dense_and_flex_masks_of_the_compared_row_are_one() -> None:
    doc, block = torch.tensor([[0, 0, 0, 1, 1, -1]]), torch.tensor([[-1, 0, 0, -1, 1, -1]])
    place = torch.arange(6)
    flex = flex_mask_mod(doc, block)(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :])
    assert torch.equal(flex, dense_mask(doc, block)[0, 0])
