"""Offload by phases: what is not needed lies in main memory, and the picture is the same."""

import pytest
import torch

from bitdance import BitDancePipeline
from bitdance.model import BitDanceModel
from bitdance.networks.offload import PhaseOffload

pytestmark = pytest.mark.slow

SMALL = {"height": 64, "width": 64, "num_inference_steps": 3, "seed": 1}
PROMPTS = ["a fox, 3D style, on a white background", "a guitar"]
PARTS = ("backbone", "projector", "head", "decoder")


def demo(**options):
    return BitDancePipeline.from_pretrained("demo", device="cpu", **options)


class Watched(PhaseOffload):
    """A device that is main memory under another name: what comes is a copy, so that one can see where a tensor lies."""

    def __init__(self, model):
        super().__init__(model, "cpu")
        self.original = {id(t) for entries in self._originals.values() for *_, t in entries}
        self.copies, self.phases = 0, []

    def _copied(self, original):
        self.copies += 1
        return super()._copied(original.clone())

    def enter(self, phase):
        super().enter(phase)
        self.phases.append((phase, self.away()))

    def away(self):
        """Parts of which every tensor is a copy; ValueError for a part that is half here and half there."""
        found = set()
        for part in PARTS:
            here = {id(getattr(owner, table)[name]) in self.original for owner, table, name, _ in self._originals[part]}
            if len(here) != 1:
                raise ValueError(f"{part} is torn apart")
            if here == {False}:
                found.add(part)
        return found


def watched(**options):
    pipe = demo(**options)
    pipe.offload = Watched(pipe.model)
    return pipe


def test_phases_hold_what_they_need_and_nothing_more():
    pipe = watched()
    for _ in range(2):
        pipe(PROMPTS, **SMALL)
    first = [("prompt", {"backbone"}), ("loop", {"backbone", "projector", "head"}), ("decode", {"projector", "head", "decoder"})]
    again = [("prompt", {"backbone", "projector", "head"}), *first[1:]]
    assert pipe.offload.phases == [*first, *again]


def test_every_tensor_comes_once_per_phase_and_nothing_comes_per_block():
    pipe, counts = watched(), []
    sizes = {part: len(entries) for part, entries in pipe.offload._originals.items()}
    pipe(PROMPTS, **SMALL, callback_on_step_end=lambda *_: counts.append(pipe.offload.copies))
    assert len(counts) > 1 and set(counts) == {sizes["backbone"] + sizes["projector"] + sizes["head"]}
    assert pipe.offload.copies == sum(sizes.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures_are_the_same_with_offload(dtype):
    plain, moved = demo(dtype=dtype), watched(dtype=dtype)
    for _ in range(2):
        a, b = (pipe(PROMPTS, **SMALL, output_type="pt") for pipe in (plain, moved))
        assert torch.equal(a.bits, b.bits) and torch.equal(a.images, b.images)


@pytest.mark.parametrize("kinds", [("int8", "fp8"), ("int4", None)])
def test_quantised_weights_move_too(kinds):
    pytest.importorskip("torchao", reason='torchao is not installed: pip install "bitdance[quantize]"')
    pytest.importorskip("bitsandbytes", reason='bitsandbytes is not installed: pip install "bitdance[quantize]"')
    options = {"quantize": kinds[0], "quantize_head": kinds[1]}
    plain, moved = demo(**options), watched(**options) if kinds[0] == "int8" else demo(**options)
    if kinds[0] == "int4":  # bitsandbytes' weights are moved, never copied in place
        moved.enable_model_cpu_offload("cpu")
    for _ in range(2):
        a, b = (pipe(PROMPTS, **SMALL, output_type="bits") for pipe in (plain, moved))
        assert torch.equal(a.bits, b.bits)


def test_the_embedding_never_moves():
    pipe = watched()
    before = pipe.model.backbone.lm.get_input_embeddings().weight
    pipe("a fox", **SMALL)
    assert pipe.model.backbone.lm.get_input_embeddings().weight is before


def test_the_embeddings_rows_go_where_the_layers_are():
    pipe = demo()
    pipe.offload = PhaseOffload(pipe.model, "meta")  # holds no numbers, but is another device
    assert pipe.device == torch.device("meta")
    pipe.offload.enter("prompt")
    assert pipe.model.backbone.embed(torch.tensor([[1, 2]], device="cpu")).device.type == "meta"
    assert {p.device.type for p in pipe.model.backbone.lm.base_model.layers.parameters()} == {"meta"}
    pipe.offload.enter("decode")
    assert {p.device.type for p in pipe.model.backbone.parameters()} == {"cpu"}
    assert {p.device.type for p in pipe.model.tokenizer.decoder.parameters()} == {"meta"}


def test_a_model_that_moves_is_not_moved_by_hand_and_the_device_must_exist():
    pipe = demo()
    with pytest.raises(ValueError, match="cannot be used here"):
        pipe.enable_model_cpu_offload("cuda:99")
    pipe.enable_model_cpu_offload("cpu")
    with pytest.raises(ValueError, match="load it again"):
        pipe.to("cpu")


def test_a_model_without_decoder_is_refused():
    m = demo().model
    with pytest.raises(ValueError, match="tokenizer"):
        PhaseOffload(BitDanceModel(None, m.text_tokenizer, m.projector, m.backbone, m.head), "cpu")


@pytest.mark.gpu
def test_on_cuda_offload_takes_less_and_draws_the_same():
    peaks, bits = [], []
    for offload in (False, True):
        pipe = BitDancePipeline.from_pretrained("demo", device="cpu" if offload else "cuda", dtype="bfloat16", compile=False)
        if offload:
            pipe.enable_model_cpu_offload("cuda")
        torch.cuda.reset_peak_memory_stats()
        bits.append(pipe("a fox", **SMALL).bits)
        peaks.append(torch.cuda.max_memory_allocated())
        del pipe
        torch.cuda.empty_cache()
    assert torch.equal(*bits) and peaks[1] < peaks[0]
