"""What a batch of pictures takes: computed from configs, compared with what processes really took."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitdance.coding
import bitdance.costs.memory
from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.costs.memory import BatchSpec, Needs, needs
from bitdance.costs.shapes import SHAPES
from bitdance.folder.checkpoint import load_model
from bitdance.folder.config import ModelConfig
from bitdance.kinds import next_patch
from bitdance.networks.quantize import held_bytes, large_linears
from bitdance.picture import read_metadata
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.strips import decoding_bytes

pytestmark = pytest.mark.slow

PUBLISHED, GB = SHAPES["14b-64x"], 1e9
LARGE = BatchSpec(1024, 1024)


def test_the_published_model_needs_what_its_parts_weigh():
    loop = needs(PUBLISHED, LARGE).phases["loop"]
    for part, parameters in (("backbone", 13_212e6), ("head", 1_758_464_032), ("projector", 26_388_480)):
        assert loop[part] == pytest.approx(2 * parameters, rel=1e-3), part  # LLM: without embedding and lm_head
    assert loop["cache"] == 2 * 163_840 * (64 + 2 + 64 * 64)
    assert 33 * GB < needs(PUBLISHED, LARGE).peak < 36 * GB


def test_a_batch_decoded_beside_the_next_needs_room_for_both():
    alone, beside = (needs(PUBLISHED, replace(LARGE, batch=4, many=many)) for many in (False, True))
    loop = alone.phases["loop"]
    assert beside.phases["decode"]["next batch"] == loop["cache"] + loop["activations"]
    assert beside.phases["loop"] == loop and beside.peak > alone.peak
    for change in ({"offload": True}, {"device": "cpu"}):  # there a batch is decoded before the next begins
        assert needs(PUBLISHED, replace(LARGE, many=True, **change)) == needs(PUBLISHED, replace(LARGE, **change))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4.13)])
def test_a_quantised_llm_needs_its_bits(kind, bits):
    found = needs(PUBLISHED, replace(LARGE, quantize=kind)).phases["loop"]["backbone"]
    assert found == pytest.approx(13_212e6 * bits / 8, rel=0.003)


@pytest.mark.parametrize(("backbone", "head"), [(None, None), ("int8", "fp8"), ("int4", "int8")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_that_a_loaded_model_holds(backbone, head, dtype):
    for library in ("torchao", "bitsandbytes"):
        pytest.importorskip(library, reason=f'{library} is not installed: pip install "bitdance[quantize]"')
    model = load_model("demo", "cpu", getattr(torch, dtype), True, backbone, head)
    found = needs(ModelConfig.of_folder("demo"), BatchSpec(64, 64, 1, dtype, "cpu", True, backbone, head)).phases["loop"]

    def held(part):
        large = [linear for _, _, linear in large_linears(part)]
        names = {id(linear.weight) for linear in large}
        return sum(map(held_bytes, large)) + sum(p.nbytes for p in part.parameters() if id(p) not in names)

    embedding = model.backbone.lm.get_input_embeddings().weight.nbytes
    assert found["embedding"] == embedding and found["backbone"] == held(model.backbone) - embedding
    assert found["head"] == held(model.head)
    assert found["decoder"] == sum(p.nbytes for p in model.tokenizer.decoder.parameters())


def test_every_remedy_lowers_the_peak():
    full = replace(LARGE, batch=4, dtype="float32")
    peaks = [needs(PUBLISHED, setting).peak for _, setting in bitdance.costs.memory.remedies(full)]
    assert max(peaks) < needs(PUBLISHED, full).peak and len(peaks) == 12
    assert needs(PUBLISHED, replace(LARGE, guided=False)).peak < needs(PUBLISHED, LARGE).peak
    moved = needs(PUBLISHED, replace(LARGE, offload=True))
    assert moved.main > 31 * GB and "embedding" not in moved.phases["loop"] and "backbone" not in moved.phases["decode"]


@pytest.mark.parametrize(
    ("free", "batch", "advice"),
    [
        (35.0, 3, "--batch-size 1"),
        (23.6, 1, "--quantize int8"),
        (15.9, 1, "--quantize int4"),
        (14.0, 1, "--quantize int4 --offload"),
    ],
)
def test_the_error_before_loading_names_the_first_remedy_that_fits(tmp_path, monkeypatch, capfd, free, batch, advice):
    """The bundled model's files under the published shape, on a device of so many GB."""
    monkeypatch.setattr(next_patch, "check_folder", lambda folder: replace(PUBLISHED, folder=folder))
    monkeypatch.setattr(bitdance.costs.memory, "free_bytes", lambda device: int(free * GB))
    monkeypatch.setattr(bitdance.costs.memory, "free_main_memory", lambda: int(64 * GB))
    monkeypatch.setattr(next_patch, "batch_specs", lambda spec: {replace(LARGE, batch=spec.batch_size)})
    assert main(["generate", "a", "b", "c", "--batch-size", str(batch), "-o", str(tmp_path / "o")]) == 2
    error = capfd.readouterr().err
    assert re.search(rf"demo needs about 3\d\.\d GB, {free} GB free on (cpu|cuda): add {advice}$", error.strip()), error
    assert not (tmp_path / "o").exists()


def test_a_model_that_offload_cannot_help_says_so(monkeypatch):
    fits = bitdance.costs.memory._fits
    assert fits(Needs({"loop": {"backbone": 5}}, main=7), 5, 7)
    assert not fits(Needs({"loop": {"backbone": 5}}, main=7), 4, 7) and not fits(Needs({"loop": {"backbone": 5}}, main=7), 5, 6)
    assert fits(Needs({"loop": {"backbone": 5}}, main=7), None, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory a process took")
@pytest.mark.parametrize(
    "batch",
    [
        ["--model", "demo", "--height", "64", "--width", "64"],
        ["--model", "demo", "--height", "64", "--width", "64", "--batch-size", "16"],
        ["--shape", "mid", "--dtype", "auto"],
        ["--shape", "mid", "--batch-size", "4"],
    ],
    ids=lambda batch: " ".join(batch),
)
def test_the_peak_on_a_cpu_is_within_a_tenth_of_what_doctor_predicts(batch):
    """Each in a process of its own, as its peak would otherwise be that of the tests before."""
    command = [sys.executable, "-m", "bitdance", "doctor", *batch, "--device", "cpu", "--measure", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["needs_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1), batch


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [["--shape", "mid"], ["--shape", "mid", "--batch-size", "16"]])
def test_the_peak_on_cuda_is_within_a_tenth_of_what_doctor_predicts(batch):
    """Of what torch allocates: the context is not torch's."""
    command = [sys.executable, "-m", "bitdance", "doctor", *batch, "--device", "cuda", "--measure", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    program = found["phases"][found["phase"]]["program"]
    assert found["needs_bytes"] - program == pytest.approx(found["measured_bytes"], rel=0.1), batch


def test_doctor_shows_a_batch_by_part(capsys):
    assert main(["doctor", "--shape", "14b-64x", "--dtype", "bfloat16", "--quantize", "int4", "--device", "cpu"]) in (0, 1)
    shown = capsys.readouterr().out
    assert "14b-64x: 1 × 1024×1024 pixels" in shown and "needs about" in shown and "cache" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "64"], "--height describes a batch"),
        (["--shape", "7b"], "known are 14b-64x, 14b-16x, mid"),
        (["--model", "demo", "--height", "65"], "not supported"),
        (["--model", "demo", "--batch-size", "0"], "batch_size = 0; a whole number from 1 to 4096 is allowed"),
        (["--model", "demo", "--quantize", "int3"], "int3"),
        (["--model", "nowhere"], "no model folder"),
    ],
)
def test_doctor_refuses_what_makes_no_batch(capfd, arguments, message):
    assert main(["doctor", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_what_was_quantised_stands_in_the_picture_and_in_its_hash(tmp_path, capsys):
    pytest.importorskip("torchao", reason='torchao is not installed: pip install "bitdance[quantize]"')
    told = []
    for options in ([], ["--quantize", "int8"], ["--quantize", "int8", "--quantize-head", "fp8"]):
        folder = tmp_path / str(len(told))
        assert main(["generate", "a fox", "--steps", "2", "--device", "cpu", *options, "-o", str(folder)]) == 0
        told.append(read_metadata(next(folder.glob("*.png"))))
    assert "quantize" not in told[0] and "quantize_head" not in told[1]
    assert told[1]["quantize"] == told[2]["quantize"] == "int8" and told[2]["quantize_head"] == "fp8"
    assert len({facts["job_hash"] for facts in told}) == 3
    again = tmp_path / "again"
    assert main(["generate", "--from", str(next((tmp_path / "2").glob("*.png"))), "--device", "cpu", "-o", str(again)]) == 0
    assert read_metadata(next(again.glob("*.png"))) == told[2]


def test_offload_without_a_device_is_refused(tmp_path, capfd):
    assert main(["generate", "a", "--offload", "--device", "cpu", "-o", str(tmp_path / "o")]) == 2
    assert "--offload needs a device beside main memory" in capfd.readouterr().err


def test_a_picture_that_would_take_too_much_is_decoded_in_strips_and_is_the_same(monkeypatch):
    pipe = BitDancePipeline.from_pretrained("demo", device="cpu")
    bits = torch.randint(2, (2, 64, 8, 8), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    ways = []
    real = LFQTokenizer.decode
    monkeypatch.setattr(LFQTokenizer, "decode", lambda *args: ways.append(args[-1]) or real(*args))
    generators = [torch.Generator()] * 2
    whole = pipe.decode_tensor(bits, generators)
    monkeypatch.setattr(bitdance.coding, "DECODE_BYTES", 0)
    assert (pipe.decode_tensor(bits, generators) - whole).abs().max() < 1e-4
    assert ways == [None, None, True, True]
    limit = 1 << 30
    assert (
        decoding_bytes(PUBLISHED.tokenizer, 512, 512, 2, strips=False)
        < limit
        < decoding_bytes(PUBLISHED.tokenizer, 1024, 1024, 2, strips=False)
    )
