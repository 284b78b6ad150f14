"""Weights in 8 or 4 bits: as small as computed, and the model still does what it did."""

import importlib.util
import json
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import bitdance.networks.quantize
from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.folder.checkpoint import load_model
from bitdance.folder.parts import DEMO
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.settings import Sampling
from bitdance.networks.quantize import held_bytes, large_linears, quantized_bytes
from stages.data.captions import PALETTE
from stages.measure.prompts import background_of

pytestmark = pytest.mark.slow

KINDS = [("int8", None), ("int4", None), (None, "int8"), (None, "fp8"), ("int8", "int8"), ("int4", "fp8")]
PROMPTS = ["a fox, 3D style, on a white background", "a guitar, 3D style, on an orange background"]
# Equal bits in two pictures, each block after those of the unquantised model: measured 0.9984, 0.9838, 0.9991, 0.9982, 0.9976 and
# 0.9839 in the order of KINDS.
AGREEMENT = [0.995, 0.97, 0.997, 0.994, 0.994, 0.97]


@pytest.fixture(autouse=True)
def libraries():
    for name in ("torchao", "bitsandbytes"):
        pytest.importorskip(name, reason=f'{name} is not installed: pip install "bitdance[quantize]"')


def quantized(backbone, head, dtype="float32"):
    return BitDancePipeline.from_pretrained("demo", device="cpu", dtype=dtype, quantize=backbone, quantize_head=head)


class Recorded(BlockSampler):
    """Notes the prediction of every block; with `given` it returns these instead, so that the next block follows them."""

    def __init__(self, head, given=None):
        super().__init__(head)
        self.given, self.blocks = given, []

    def __call__(self, *args):
        self.blocks.append(super().__call__(*args))
        return self.blocks[-1] if self.given is None else self.given[len(self.blocks) - 1]


def blocks(model, given=None):
    sampler = Recorded(model.head, given)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    generate_bits(model, PROMPTS, 8, 8, Sampling(10, 3.0), generators, block_sampler=sampler)
    return torch.stack(sampler.blocks)


@pytest.mark.parametrize(("kinds", "least"), list(zip(KINDS, AGREEMENT, strict=True)))
def test_bits_agree_with_those_of_the_unquantised_model(kinds, least):
    expected = blocks(load_model("demo", "cpu"))
    found = blocks(load_model("demo", "cpu", quantize=kinds[0], quantize_head=kinds[1]), given=expected)
    share = ((expected > 0) == (found > 0)).float().mean().item()
    assert least <= share < 1, share


@pytest.mark.parametrize("kinds", KINDS[-2:])
def test_prompts_are_still_followed(kinds):
    prompts = [f"a fox, 3D style, on {'an' if name[0] == 'o' else 'a'} {name} background" for name in PALETTE]
    pipe = quantized(*kinds)
    assert [background_of(image) for image in pipe(prompts, 64, 64, num_inference_steps=15, seed=3).images] == list(PALETTE)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_take_the_bytes_that_are_computed_and_everything_keeps_its_place(kinds, dtype):
    plain = load_model("demo", "cpu", dtype)
    model = load_model("demo", "cpu", dtype, quantize=kinds[0], quantize_head=kinds[1])
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in model.named_modules()]
    for part, kind in zip(("backbone", "head"), kinds, strict=True):
        for (_, name, before), (_, same, after) in zip(*(large_linears(getattr(m, part)) for m in (plain, model)), strict=True):
            assert name == same and isinstance(after, nn.Linear) and before.weight.nbytes == held_bytes(before)
            expected = quantized_bytes(*before.weight.shape, kind) if kind else before.weight.nbytes
            assert held_bytes(after) == expected, (name, kind)
    rest = [p for p in model.parameters() if type(p) is nn.Parameter and type(p.data) is torch.Tensor]
    assert {p.dtype for p in rest} == {dtype}
    assert model.backbone.lm.lm_head.weight is model.backbone.lm.base_model.embed_tokens.weight


def test_no_two_matrices_are_at_full_precision_at_the_same_time(monkeypatch):
    """Counted where a matrix is quantised: what went before is done, and nothing after it has been copied out of the file."""
    model = load_model("demo", "cpu", torch.bfloat16)  # the dtype of the file
    seen = []
    real = bitdance.networks.quantize._QUANTIZERS["int8"]

    def spy(linear):
        kinds = [type(layer.weight.data) is torch.Tensor for _, _, layer in large_linears(model.backbone)]
        seen.append(kinds.count(True))
        return real(linear)

    monkeypatch.setitem(bitdance.networks.quantize._QUANTIZERS, "int8", spy)
    bitdance.networks.quantize.quantize_model(model, "int8", None, "cpu", torch.float32)
    assert seen == list(range(len(seen), 0, -1)) and len(seen) == 42


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures_do_not_depend_on_their_neighbours(dtype):
    pipe = quantized("int8", "int8", dtype)
    both = pipe(PROMPTS, 64, 64, num_inference_steps=3, seed=[1, 2], output_type="bits").bits
    alone = pipe(PROMPTS[1], 64, 64, num_inference_steps=3, seed=2, output_type="bits").bits
    if dtype == "float32":
        assert torch.equal(alone[0], both[1])
    else:  # as without quantisation, the order of bfloat16 sums depends on the number of rows
        assert (alone[0] == both[1]).float().mean() > 0.9


def test_a_quantised_pipeline_is_neither_saved_nor_converted(tmp_path):
    pipe = quantized("int8", None)
    with pytest.raises(ValueError, match="without quantize"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    for change in ({"dtype": "bfloat16"}, {"device": "meta"}):
        with pytest.raises(ValueError, match="load the model again"):
            pipe.to(**change)


@contextmanager
def nothing_is_read(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(bitdance.folder.checkpoint.Backbone, "from_pretrained", fail)
        yield


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize": "int3"}, "quantize = 'int3'; allowed are int8, int4"),
        ({"quantize": "fp8"}, "quantize = 'fp8'; allowed are int8, int4"),
        ({"quantize_head": "int4"}, "quantize_head = 'int4'; allowed are int8, fp8"),
        ({"quantize": "int8", "device": "mps"}, "no kernel on mps"),
    ],
)
def test_what_cannot_be_quantised_is_said_before_loading(monkeypatch, change, message):
    with nothing_is_read(monkeypatch), pytest.raises(ValueError, match=message):
        BitDancePipeline.from_pretrained(DEMO, **{"device": "cpu", **change})


def test_a_library_that_is_missing_is_named_before_loading(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with nothing_is_read(monkeypatch), pytest.raises(ValueError, match=r"needs bitsandbytes: pip install \"bitdance\[quantize\]"):
        load_model("demo", "cpu", quantize="int4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_in_strips_gives_the_numbers_of_torchao(dtype):
    torch.manual_seed(0)
    layer = bitdance.networks.quantize._QUANTIZERS["int8"](nn.Linear(96, 600, dtype=dtype).requires_grad_(False))
    assert layer.STRIP < 600 and 600 % layer.STRIP  # several strips, and a smaller one at the end
    for shape in ((1, 96), (2, 5, 96)):
        x = torch.randn(shape, dtype=dtype)
        with torch.inference_mode():
            found, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        if dtype == torch.bfloat16:
            assert torch.equal(found, expected)
        else:  # another library, the same numbers up to rounding
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_quantised_weights_cost_in_time_is_measured_and_said(monkeypatch, capsys, tmp_path):
    factor = bitdance.networks.quantize.times_as_long("int8", torch.float32)
    assert 0 < factor < 1000 and factor == bitdance.networks.quantize.times_as_long("int8", torch.float32)  # once
    monkeypatch.setattr(bitdance.networks.quantize, "times_as_long", lambda kind, dtype: 2.34 if kind == "int8" else 0.5)
    asked = ["--device", "cpu", "--dtype", "float32", "--quantize", "int8"]
    assert main(["doctor", "--model", "demo", *asked]) == 0
    said = "int8 weights make a linear layer take 2.3 times as long as float32 ones on this CPU"
    shown = capsys.readouterr().out
    assert said in shown and "they save memory here, not time" in shown
    picture = ["a fox", "--height", "64", "--width", "64", "--steps", "1", *asked, "--quantize-head", "fp8", "-o", str(tmp_path)]
    assert main(["generate", *picture]) == 0
    warned = capsys.readouterr().err
    assert said in warned and "fp8 weights make a linear layer take 0.5 times as long" in warned
    assert warned.count("save memory here") == 1


def test_of_plain_weights_nothing_is_measured(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(bitdance.networks.quantize, "times_as_long", fail)
    assert main(["doctor", "--model", "demo", "--device", "cpu", "--json"]) == 0
    assert "speed" not in json.loads(capsys.readouterr().out)
