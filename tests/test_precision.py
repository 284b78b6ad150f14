"""bfloat16 is taken where the processor has instructions for it, and whoever asks for it elsewhere is told what it costs."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import bitdance.networks.precision
from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.networks.precision import quick_dtype, resolve_dtype, slow_bfloat16

MODEL = Path(__file__).parent / "golden" / "t2i_ckpt"


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """Say what the processor has; nothing is measured."""

    def have(*instructions: str, capability: str = "AVX512") -> None:
        found = {"architecture": "x86_64", **dict.fromkeys(instructions, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)  # torch 2.8 has none
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(bitdance.networks.precision, "_measured", lambda: 9.0)

    return have


def test_auto_is_the_quick_one(processor) -> None:
    processor("avx512_bf16")
    assert quick_dtype("cpu") == resolve_dtype("auto", "cpu") == "bfloat16" and slow_bfloat16("cpu") is None
    processor("amx_bf16")
    assert quick_dtype("cpu") == "bfloat16"
    processor("avx512_f")
    assert quick_dtype("cpu") == resolve_dtype("auto", "cpu") == "float32" and slow_bfloat16("cpu") == 9.0
    processor("avx512_bf16", capability="AVX2")  # as ATEN_CPU_CAPABILITY=avx2 has it
    assert quick_dtype("cpu") == "float32"


def test_slow_bfloat16_is_named_with_its_factor_and_nothing_else_warns(processor, capsys: pytest.CaptureFixture[str]) -> None:
    processor()
    with pytest.warns(UserWarning, match="bfloat16 takes about 9 times as long as float32 on this processor"):
        assert resolve_dtype("bfloat16", "cpu") == "bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [resolve_dtype(name, "cpu") for name in ("auto", "float32", "float16")] == ["float32", "float32", "float16"]
        assert resolve_dtype("bfloat16", "meta") == "bfloat16"
    with pytest.warns(UserWarning, match="takes about 9 times"):
        assert BitDancePipeline.from_pretrained(MODEL, device="cpu", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert BitDancePipeline.from_pretrained(MODEL, device="cpu", dtype="auto").dtype == torch.float32
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["devices"][0]["bfloat16_times_float32"] == 9.0


def test_a_picture_says_the_dtype_that_auto_chose(processor, tmp_path: Path) -> None:
    processor()
    arguments = ["generate", "a", "--model", str(MODEL), "--height", "32", "--width", "32", "--steps", "1", "--device", "cpu"]
    assert main([*arguments, "--dtype", "auto", "-o", str(tmp_path)]) == 0
    (picture,) = tmp_path.glob("*.png")
    from bitdance.picture import read_metadata

    assert read_metadata(picture)["dtype"] == "float32"


def test_an_older_processor_can_be_imitated() -> None:
    code = (
        "from bitdance.networks.precision import quick_dtype, slow_bfloat16; print(quick_dtype('cpu'), slow_bfloat16('cpu') >= 1)"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "float32 True\n"


def test_a_pipeline_moves_as_those_of_torch_and_diffusers_do() -> None:
    pipe = BitDancePipeline.from_pretrained(MODEL, device="cpu")
    assert pipe.to(torch.float16).dtype == torch.float16 and pipe.to("float32").dtype == torch.float32
    assert pipe.to("cpu", torch.float16).to(dtype=torch.float32, device="cpu").dtype == torch.float32
    assert set(pipe.components) == {"text_tokenizer", "backbone", "projector", "head", "tokenizer"}
    with pytest.raises(ValueError, match="one device and one dtype at most"):
        pipe.to("cpu", "cpu")
    with pytest.raises(ValueError, match="two names of one value"):
        BitDancePipeline.from_pretrained(MODEL, dtype="float32", torch_dtype="float32")
    images, bits, seeds = pipe("a", height=32, width=32, num_inference_steps=1, seed=3, return_dict=False)
    out = pipe("a", height=32, width=32, num_inference_steps=1, seed=3)
    assert seeds == out.seeds == [3] and torch.equal(bits, out.bits) and images[0].size == out.images[0].size
