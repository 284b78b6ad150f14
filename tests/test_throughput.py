"""Many prompts: what batching, overlapping and sharding may never change, and what they must not cost."""

import gc
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bitdance.jobs.outputs
from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.cli.generate import parser, read_spec
from bitdance.jobs.job import Job
from bitdance.jobs.outputs import OutputFolder
from bitdance.jobs.runner import BatchRunner, BatchWriter, DecodeStream, RunSpec
from bitdance.model import BitDanceModel
from bitdance.picture import to_uint8
from bitdance.sequence.prompt import conditional_ids
from lfq_tokenizer import LFQTokenizer, TokenizerConfig

pytestmark = pytest.mark.slow

MODEL = str(Path(__file__).parent / "golden" / "t2i_ckpt")
SMALL = ["--height", "32", "--width", "32", "--steps", "1", "--guidance", "2", "--device", "cpu", "--model", MODEL]
PROMPTS = ["a cat", "a dog that is a good deal longer, with a hat on its head", "", "ein Häuschen", "x", "two red balls " * 9]


def ordered(folder: Path, *arguments: str) -> RunSpec:
    return read_spec(parser().parse_intermixed_args([*arguments, *SMALL, "-o", str(folder)]))


def generate(folder: Path, *arguments: str) -> int:
    return main(["generate", *arguments, *SMALL, "-o", str(folder)])


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pipe() -> BitDancePipeline:
    pipe = BitDancePipeline.from_pretrained(MODEL, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Calls:
    """The batches that a pipeline gets; `before(prompts)` runs ahead of each."""

    def __init__(self, pipe: BitDancePipeline, before: Callable[[Sequence[str]], None] = lambda prompts: None) -> None:
        self.pipe, self.before = pipe, before
        self.batches: list[list[str]] = []

    def generate(self, prompts: Sequence[str], *options: Any) -> Any:
        self.before(prompts)
        self.batches.append(list(prompts))
        return self.pipe.generate(prompts, *options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def test_batches_hold_prompts_of_similar_length_and_pad_little(tmp_path: Path, pipe: BitDancePipeline) -> None:
    prompts = [f"{'many words ' * (i * 5 % 16)}{i}" for i in range(16)]
    order, calls = ordered(tmp_path, *prompts, "--batch-size", "4"), Calls(pipe)
    BatchRunner(order, OutputFolder(tmp_path, "m")).make(calls, order.jobs)  # type: ignore[arg-type]
    lengths = [[len(conditional_ids(pipe.model.text_tokenizer, p)) for p in batch] for batch in calls.batches]
    assert [len(batch) for batch in lengths] == [4, 4, 4, 4]
    assert all(max(short) <= min(long) for short, long in pairwise(lengths))
    assert all(batch == sorted(batch, key=prompts.index) for batch in calls.batches)
    padding = sum(max(batch) * len(batch) - sum(batch) for batch in lengths)
    as_given = [[len(conditional_ids(pipe.model.text_tokenizer, p)) for p in prompts[i : i + 4]] for i in range(0, 16, 4)]
    assert padding < 0.3 * sum(max(batch) * len(batch) - sum(batch) for batch in as_given)


def test_neither_batch_size_nor_the_order_of_prompts_changes_a_picture(tmp_path: Path) -> None:
    for name, prompts, size in (("a", PROMPTS, 8), ("b", PROMPTS, 4), ("c", PROMPTS[::-1], 8), ("d", PROMPTS, 1)):
        lines = [json.dumps({"prompt": p, "id": f"p{PROMPTS.index(p)}", "n": 2}) for p in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        assert generate(tmp_path / name, "--prompts", str(tmp_path / f"{name}.jsonl"), "--batch-size", str(size)) == 0
    assert len(pictures(tmp_path / "a")) == 12
    for name in "bcd":
        assert pictures(tmp_path / name) == pictures(tmp_path / "a")


def test_shards_stopped_and_resumed_give_the_files_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*PROMPTS, "--seed", "1", "2", "--batch-size", "2"]
    assert generate(tmp_path / "whole", *arguments) == 0
    write_png = bitdance.jobs.outputs.write_png
    written: list[Any] = []

    def write(*found: Any) -> None:
        if len(written) % 3 == 2:  # every third picture: the disk is full, the run ends
            written.append(None)
            raise OSError(28, "No space left on device")
        written.append(found[1])
        write_png(*found)

    monkeypatch.setattr(bitdance.jobs.outputs, "write_png", write)
    for shard in range(3):
        codes: list[int] = []
        while not codes or codes[-1]:
            codes.append(generate(tmp_path / "parts", *arguments, "--shard", f"{shard}/3"))
            assert len(codes) < 5
        assert codes[0] == 1  # it was stopped at least once
    assert "No space left on device" in capfd.readouterr().err
    assert pictures(tmp_path / "parts") == pictures(tmp_path / "whole") and len(pictures(tmp_path / "whole")) == 12
    assert sorted(row["file"] for row in manifest(tmp_path / "parts")) == sorted(pictures(tmp_path / "whole"))


def test_a_batch_is_written_while_the_next_is_made(tmp_path: Path, pipe: BitDancePipeline) -> None:
    """The loop of batch 2 waits for a picture of batch 1: without overlap it would wait in vain."""
    first = tmp_path / "0000-a-0.png"

    def before(prompts: Sequence[str]) -> None:
        if prompts == ["b"]:
            end = time.monotonic() + 200
            while not first.exists():
                assert time.monotonic() < end, "batch 1 is not written while batch 2 is made"
                time.sleep(0.002)

    order = ordered(tmp_path, "a", "b", "--batch-size", "1")
    maker, calls = BatchRunner(order, OutputFolder(tmp_path, "m")), Calls(pipe, before)
    maker.make(calls, order.jobs)  # type: ignore[arg-type]
    assert (maker.made, maker.failures) == (2, [])


def job(index: int) -> Job:
    return Job(index, f"{index}.png", "p", index, 8, 8, 1, 1.0)


def test_at_most_one_batch_waits_and_the_order_stays() -> None:
    gate, saved = threading.Semaphore(0), []

    def save(job: Job, picture: Image.Image, seconds: float) -> None:
        gate.acquire()
        saved.append(job.index)

    finisher, given = BatchWriter(save, print), []

    def give() -> None:
        for i in range(4):
            finisher.give([job(2 * i), job(2 * i + 1)], lambda: (np.zeros((2, 8, 8, 3), np.uint8), np.ones(2, bool)), 0.0)
            given.append(i)

    giver = threading.Thread(target=give, daemon=True)
    giver.start()
    end = time.monotonic() + 20
    while len(given) < 2:
        assert time.monotonic() < end, given
        time.sleep(0.002)
    time.sleep(0.2)
    assert given == [0, 1]  # one is being saved, one waits; the third has to wait outside
    for _ in range(8):
        gate.release()
    giver.join(20)
    finisher.close()
    assert saved == list(range(8))


def test_what_goes_wrong_while_writing_is_raised_where_the_batches_are_made() -> None:
    saved = []

    def save(job: Job, picture: Image.Image, seconds: float) -> None:
        if job.index == 1:
            raise OSError(28, "No space left on device")
        saved.append(job.index)

    finisher = BatchWriter(save, print)
    finisher.give([job(0), job(1), job(2)], lambda: (np.zeros((3, 8, 8, 3), np.uint8), np.ones(3, bool)), 0.0)
    with pytest.raises(OSError, match="No space left"):
        finisher.close()
    with pytest.raises(OSError, match="No space left"):
        finisher.check()
    assert saved == [0]


def test_a_full_disk_ends_the_batch_in_the_loop(tmp_path: Path, pipe: BitDancePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the next batch: with large models a batch takes minutes."""
    writers: list[BatchWriter] = []

    class Seen(BatchWriter):
        def __init__(self, *arguments: Any) -> None:
            writers.append(self)
            super().__init__(*arguments)

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bitdance.jobs.runner, "BatchWriter", Seen)
    monkeypatch.setattr(bitdance.jobs.outputs, "write_png", write)
    order = ordered(tmp_path, *"abcdef", "--batch-size", "2")

    def before(_: Sequence[str]) -> None:
        end = time.monotonic() + 20
        while calls.batches and writers[0]._error is None and time.monotonic() < end:
            time.sleep(0.002)

    calls = Calls(pipe, before)
    maker = BatchRunner(order, OutputFolder(tmp_path, "m"))
    with pytest.raises(OSError, match="No space left"):
        maker.make(calls, order.jobs)  # type: ignore[arg-type]
    assert len(calls.batches) == 2 and maker.made == 0 and maker.failures == []


def test_a_generative_decoder_draws_from_the_pictures_own_generator(tmp_path: Path, pipe: BitDancePipeline) -> None:
    """Bits first and pixels later: the draws are those of the pipeline that does both."""
    torch.manual_seed(0)
    config = TokenizerConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=8, gan_decoder=True)
    model = pipe.model
    parts = (model.text_tokenizer, model.projector, model.backbone, model.head)
    other = BitDancePipeline(BitDanceModel(LFQTokenizer(config).eval(), *parts))
    order = ordered(tmp_path, "a", "a longer one", "b", "--batch-size", "2")
    BatchRunner(order, OutputFolder(tmp_path, "m")).make(other, order.jobs)
    for job in order.jobs:
        expected = other(job.prompt, 32, 32, num_inference_steps=1, guidance_scale=2.0, seed=job.seed).images
        assert expected is not None
        assert Image.open(tmp_path / job.file).tobytes() == expected[0].tobytes()


def tensors() -> tuple[int, int]:
    """How many tensors Python holds, and their elements."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return len(found), sum(o.numel() for o in found)


def resident() -> int:
    """Bytes of main memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc, which is not there")
def test_200_batches_of_varied_prompts_do_not_grow_the_memory(tmp_path: Path, pipe: BitDancePipeline) -> None:
    """Not one tensor more than before, and less than 1 MB of resident memory (0.01 MB measured).

    The second round has other seeds but the lengths of the first: on a CPU oneDNN compiles kernels for each new number of
    rows and keeps the last 1,024 of them, which is growth that ends (docs/generation/throughput.md).
    """
    draw = random.Random(0)
    prompts = [" ".join(["red", "a", "table", "häuschen"][k % 4] for k in range(n)) for n in range(24)]
    lines = [{"prompt": draw.choice(prompts), "height": 16 + 16 * (i % 2), "guidance": 1 + i // 2 % 3} for i in range(402)]

    def make(seed: int) -> int:
        folder, file = tmp_path / str(seed), tmp_path / f"{seed}.jsonl"
        file.write_text("\n".join(json.dumps({**line, "seed": seed}) for line in lines))
        folder.mkdir()
        order = ordered(folder, "--prompts", str(file), "--batch-size", "2")
        calls = Calls(pipe)
        BatchRunner(order, OutputFolder(folder, "m")).make(calls, order.jobs)  # type: ignore[arg-type]
        return len(calls.batches)

    make(1)
    before = tensors(), resident()
    assert make(2) > 200
    growth = resident() - before[1]
    print(f"resident memory: {growth / 1e6:+.2f} MB after 200 batches")
    assert tensors() == before[0]
    assert growth < 1e6


@pytest.mark.gpu
def test_on_cuda_decoding_is_only_queued_and_gives_the_same_pixels() -> None:
    pipe = BitDancePipeline.from_pretrained(MODEL, device="cuda", dtype="float32")
    bits = torch.randint(2, (3, 8, 4, 4), device="cuda").float() * 2 - 1
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    decoder = DecodeStream(pipe)
    expected = to_uint8(pipe.decode_tensor(bits, generators)).cpu().numpy()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second on this stream, which the bits would come from
    slept = torch.cuda.Event()
    slept.record()
    pixels = decoder.decode(bits, generators)
    assert not slept.query()  # it came back while the stream still slept
    assert abs(pixels()[0].astype(int) - expected.astype(int)).max() <= 1
