"""Faster kernels come in only where they can run; everywhere else nothing at all changes."""

import ast
import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import HIDDEN, tiny_backbone
from torch import Tensor, nn
from torch.nn.functional import silu

from bitdance.networks import kernels
from bitdance.networks.backbone import Backbone
from bitdance.networks.kernels import OneDnnLinear, use_fused_kernels, use_onednn

ROOT = Path(__file__).parent.parent
STAND_IN = """
class LigerRMSNorm:
    def __init__(self, *_, **__): raise AssertionError("a kernel for CUDA was used elsewhere")
LigerSwiGLUMLP = LigerRMSNorm
"""


def hidden(backbone: Backbone) -> Tensor:
    return backbone(torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(0)).to(backbone.device))


@torch.no_grad()
def nothing_changes(device: str | None) -> None:
    backbone = tiny_backbone()
    before, modules = hidden(backbone), [*backbone.modules()]
    assert use_fused_kernels(backbone.lm, device) == []
    assert all(a is b for a, b in zip(backbone.modules(), modules, strict=True))
    assert torch.equal(hidden(backbone), before)


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_without_liger_nothing_changes(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    nothing_changes(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # where there is a GPU, Liger alone is what lacks
    nothing_changes(device)


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_with_liger_and_without_cuda_nothing_changes(device: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    (tmp_path / "liger_kernel" / "transformers.py").write_text(STAND_IN)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nothing_changes(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AssertionError, match="used elsewhere"):  # the stand-in is what would have been used
        use_fused_kernels(tiny_backbone().lm, "cuda")
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.delitem(sys.modules, name)


class PlainNorm(nn.Module):
    """Liger's arguments, torch's arithmetic."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, in_place: bool = True) -> None:
        super().__init__()
        assert not in_place
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class PlainSwiGLU(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def test_modules_are_replaced_in_this_model_alone_and_keep_weights_and_names() -> None:
    """With stand-ins of Liger's signature, since its kernels need a GPU."""
    plain, other = tiny_backbone(), tiny_backbone()
    fused = copy.deepcopy(plain)
    names, weights = list(fused.state_dict()), {id(p) for p in fused.parameters()}
    assert kernels._replace(fused.lm, PlainNorm, PlainSwiGLU) == ["RMSNorm", "SwiGLU"]
    assert list(fused.state_dict()) == names and {id(p) for p in fused.parameters()} == weights
    kinds = [type(module) for module in fused.modules()]
    assert kinds.count(PlainNorm) == 9 and kinds.count(PlainSwiGLU) == 2  # two layers: 4 norms each, and the last one
    assert not any(isinstance(module, PlainNorm | PlainSwiGLU) for module in other.modules())
    assert not any(module.training for module in fused.modules())
    torch.testing.assert_close(hidden(fused), hidden(plain), rtol=0, atol=1e-6)
    assert not any(p.is_meta for p in fused.parameters())


def test_a_family_with_other_norms_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_replace", lambda *_: pytest.fail("replaced"))
    backbone = tiny_backbone()
    backbone.lm.config.model_type = "gemma"
    assert use_fused_kernels(backbone.lm, "cuda") == []


def test_importing_the_library_imports_no_kernels() -> None:
    for path in sorted((ROOT / "bitdance").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # only what runs at import
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            assert not {name.split(".")[0] for name in names} & {"liger_kernel", "flash_attn"}, path.name


@pytest.mark.gpu
def test_on_a_gpu_hidden_states_and_gradients_stay() -> None:
    pytest.importorskip("liger_kernel", reason="pip install liger-kernel")
    plain, fused = (tiny_backbone().cuda() for _ in range(2))
    assert use_fused_kernels(fused.lm) == ["RMSNorm", "SwiGLU"]
    torch.testing.assert_close(hidden(fused), hidden(plain), rtol=0, atol=1e-4)
    for backbone in (plain, fused):
        hidden(backbone).square().mean().backward()
    for one, other in zip(plain.lm.base_model.layers.parameters(), fused.lm.base_model.layers.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


def layer_and_input(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(1)
    return nn.Linear(48, 80).to(dtype), torch.randn(2, 5, 48).to(dtype)


@needs_onednn
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_onednn_gives_the_same_numbers(dtype, tolerance, packing, monkeypatch):
    layer, x = layer_and_input(dtype)
    expected, weights = layer(x), {name: value.clone() for name, value in layer.state_dict().items()}
    if not packing:
        monkeypatch.setattr(kernels, "PACK_LIMIT", 0)
    assert use_onednn(nn.Sequential(layer)) == 1 and isinstance(layer, OneDnnLinear)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=tolerance)
    served = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (layer._packed is not None) == (packing and served)
    assert layer.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in layer.state_dict().items())


@needs_onednn
def test_packed_weights_follow_every_change():
    layer, x = layer_and_input()
    use_onednn(layer)
    changes = [
        lambda: layer.weight.mul_(2.0),
        lambda: layer.load_state_dict({name: -value for name, value in layer.state_dict().items()}),
        lambda: setattr(layer, "weight", nn.Parameter(layer.weight * 3)),
        lambda: layer.to(torch.bfloat16).to(torch.float32),
    ]
    with torch.no_grad():
        for change in changes:
            before = layer(x)
            change()
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-5)
            assert change is changes[-1] or not torch.equal(layer(x), before)
        assert copy.deepcopy(layer)._packed is None and torch.equal(copy.deepcopy(layer)(x), layer(x))


@needs_onednn
def test_training_is_left_to_torch():
    layer, x = layer_and_input()
    plain = copy.deepcopy(layer)
    use_onednn(layer)
    for each in (layer, plain):
        each(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad) and layer._packed is None


@needs_onednn
def test_layers_of_another_kind_stay():
    class Special(nn.Linear):
        pass

    module = nn.Sequential(Special(4, 4), nn.Embedding(3, 4), nn.LayerNorm(4))
    kinds = [type(part) for part in module]
    assert use_onednn(module) == 0 and [type(part) for part in module] == kinds
