"""`bitdance export`: every layout, from every checkpoint, tensor for tensor, in bounded memory, whole or not at all."""

import json
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from test_debug_run import place  # noqa: F401 (a fixture)
from torch import Tensor

import bitdance.folder.conversion
import stages.cli
from bitdance.folder.checkpoint import load_model, save_model
from bitdance.folder.conversion import convert
from bitdance.folder.parts import DEMO
from bitdance.folder.source import StoredModel
from bitdance.folder.stored import open_stored, pieces
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import write_safetensors
from stages.config import GeneratorTraining
from stages.engine import checkpoint
from stages.export import export_checkpoint
from stages.recipes.generator.objective import GeneratorObjective

pytestmark = pytest.mark.slow

PUBLISHED = GOLDEN / "t2i_ckpt"  # an untied text output; the demo's is tied
LAYOUTS = ("official", "diffusers")


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor, read whole by the library."""
    source = StoredModel.open(folder)
    paths = sorted({held.path for _, _, held in source.tensors()})  # type: ignore[attr-defined]
    files = {path: load_file(str(path)) for path in paths}
    return {f"{part}/{name}": files[held.path][name] for part, name, held in source.tensors()}  # type: ignore[attr-defined]


def assert_same(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and len(first) > 50
    assert all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(PUBLISHED, tmp_path / "model", copy_function=shutil.copyfile)


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: Any) -> str:
    """The one line of the error; nothing is left, neither at the destination nor beside it."""
    before = sorted(out.parent.iterdir())
    assert stages.cli.export([*map(str, arguments)]) == 2
    assert sorted(out.parent.iterdir()) == before
    return capsys.readouterr().err


def test_the_published_layout_passes_byte_for_byte(tmp_path: Path) -> None:
    assert stages.cli.export([str(PUBLISHED), str(tmp_path / "out"), "--format", "official"]) == 0
    names = sorted(path.name for path in PUBLISHED.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "README.md", "conversion.json"])
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (PUBLISHED / name).read_bytes(), name


@pytest.mark.parametrize("model", [PUBLISHED, DEMO], ids=["untied", "tied"])
def test_there_and_back_no_tensor_changes_in_one_file_or_several(tmp_path: Path, model: Path) -> None:
    convert(StoredModel.open(model), tmp_path / "a", "diffusers", shard_bytes=100_000)
    convert(StoredModel.open(tmp_path / "a"), tmp_path / "b", "official", shard_bytes=70_000)
    convert(StoredModel.open(tmp_path / "b"), tmp_path / "c", "official")
    for name, text in (("a", "text_encoder"), ("b", ".")):
        index = read_json(tmp_path / name / text / "model.safetensors.index.json")
        files = sorted((tmp_path / name / text).glob("model-*.safetensors"))
        assert len(files) > 1 and {path.name for path in files} == set(index["weight_map"].values())
        held = [held for path in files for held in open_stored(path).values()]
        assert index["metadata"]["total_size"] == sum(prod(h.shape) * h.dtype.itemsize for h in held)
    for name in "abc":
        assert_same(tmp_path / name, model)
    assert ("lm_head.weight" in load_file(tmp_path / "c" / "model.safetensors")) == (model == PUBLISHED)
    assert read_json(tmp_path / "c" / "vision_head_config.json") == read_json(model / "vision_head_config.json")
    a, b = (load_model(where, "cpu").state_dict() for where in (model, tmp_path / "a"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize(("short", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_a_dtype_reaches_every_tensor_and_the_config(tmp_path: Path, format: str, short: str, dtype: torch.dtype) -> None:
    assert stages.cli.export([str(PUBLISHED), str(tmp_path / "out"), "--format", format, "--dtype", short]) == 0
    found, source = tensors(tmp_path / "out"), tensors(PUBLISHED)
    assert all(torch.equal(found[name], source[name].to(dtype)) and found[name].dtype == dtype for name in source)
    config = tmp_path / "out" / ("config.json" if format == "official" else "text_encoder/config.json")
    assert f"torch.{read_json(config)['dtype']}" == str(dtype)


def test_conversion_json_says_where_from_and_names_no_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_checkpoint(PUBLISHED, tmp_path / name / "out", format="diffusers")
    said = (tmp_path / "a" / "out" / "conversion.json").read_text()
    assert said == (tmp_path / "b" / "out" / "conversion.json").read_text()
    found = json.loads(said)
    assert (found["format"], found["key_map_version"], len(found["source"]["tensors_sha256"])) == ("diffusers", 1, 64)
    export_checkpoint(tmp_path / "a" / "out", tmp_path / "c")
    assert read_json(tmp_path / "c" / "conversion.json")["source"]["tensors_sha256"] == found["source"]["tensors_sha256"]
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert str(tmp_path).encode() not in path.read_bytes(), path


# Checkpoints


def checkpoint_of(run: Path, world: int, zero: int) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose average is not what was trained, cut as `world` processes hold it; and what was trained."""
    model = load_model(PUBLISHED, "cpu")
    objective = GeneratorObjective(model, GeneratorTraining())
    generator = torch.Generator().manual_seed(1)
    raw = {name: torch.randn(p.shape, generator=generator) for name, p in objective.named_parameters()}
    cut: list[dict[str, tuple[int, Tensor]]] = [{} for _ in range(world)]
    total, begin = sum(t.numel() for t in raw.values()), 0
    for name, tensor in raw.items():
        flat = tensor.flatten()
        for rank in range(world):
            if zero == 0:
                first, last = (0, len(flat)) if rank == 0 else (0, 0)
            elif zero == 3:  # equal pieces of every parameter
                piece = -(-len(flat) // world)
                first, last = min(rank * piece, len(flat)), min((rank + 1) * piece, len(flat))
            else:  # a stretch of one long vector
                share = -(-total // world)
                first, last = (min(max(edge - begin, 0), len(flat)) for edge in (rank * share, (rank + 1) * share))
            if last > first:
                cut[rank][f"weight/{name}"] = first, flat[first:last].clone()
        begin += len(flat)

    def write(folder: Path) -> None:
        save_model(model, folder / "model")
        (folder / "resume").mkdir()
        write_json({"processes": world, "zero_stage": zero}, folder / "resume" / "state.json")
        for rank, held in enumerate(cut):
            if held:
                places = {key: (first, raw[key.partition("/")[2]].numel()) for key, (first, _) in held.items()}
                path = folder / "resume" / f"learner_{rank:05d}.safetensors"
                write_safetensors({key: t for key, (_, t) in held.items()}, path, {"places": json.dumps(places)})

    return checkpoint.save(run, 7, write, keep=1), raw


PREFIXES = {"backbone": "model.backbone.lm.", "head": "model.head.", "projector": "model.projector."}


@pytest.mark.parametrize(
    ("world", "zero", "format"),
    [(1, 0, "official"), (2, 0, "official"), (3, 1, "official"), (2, 2, "diffusers"), (5, 3, "official")],
)
def test_raw_and_averaged_weights_of_any_processes_and_stage(tmp_path: Path, world: int, zero: int, format: str) -> None:
    step, raw = checkpoint_of(tmp_path / "run", world, zero)
    for weights in ("ema", "raw"):
        arguments = [str(tmp_path / "run"), str(tmp_path / weights), "--weights", weights, "--format", format]
        assert stages.cli.export(arguments) == 0
    assert_same(tmp_path / "ema", step / "model")
    found = tensors(tmp_path / "raw")
    for name, tensor in found.items():
        part, _, leaf = name.partition("/")
        expected = raw[PREFIXES[part] + leaf] if part in PREFIXES else tensors(step / "model")[name]
        assert torch.equal(tensor, expected), name
    source = read_json(tmp_path / "raw" / "conversion.json")["source"]
    assert (source["kind"], source["step"], source["weights"]) == ("checkpoint", 7, "raw")


def test_raw_weights_of_a_real_run_are_what_it_saved(place: Path, tmp_path: Path) -> None:  # noqa: F811
    assert stages.cli.export([str(place / "whole"), str(tmp_path / "raw"), "--weights", "raw"]) == 0
    newest = checkpoint.newest(place / "whole")
    saved = load_file(newest / "resume" / "learner_00000.safetensors")
    found, averaged, differ = tensors(tmp_path / "raw"), tensors(newest / "model"), 0
    for name, tensor in found.items():
        part, _, leaf = name.partition("/")
        if part in PREFIXES:
            assert torch.equal(tensor.flatten(), saved[f"weight/{PREFIXES[part]}{leaf}"])
            differ += not torch.equal(tensor, averaged[name])
        else:
            assert torch.equal(tensor, averaged[name])
    assert differ > 20


def test_a_lost_process_is_named_with_ten_parameters_at_most(tmp_path: Path, capsys: Any) -> None:
    step, _ = checkpoint_of(tmp_path / "run", 3, 3)
    (step / "resume" / "learner_00001.safetensors").unlink()
    message = refused(capsys, tmp_path / "out", step, tmp_path / "out", "--weights", "raw")
    assert "learner_00001.safetensors is missing" in message
    manifest = read_json(step / "manifest.json")  # someone who takes it off the list gets no further
    del manifest["files"]["resume/learner_00001.safetensors"]
    write_json(manifest, step / "manifest.json")
    message = refused(capsys, tmp_path / "out", step, tmp_path / "out", "--weights", "raw")
    assert "files of 2 processes; the run had 3" in message
    assert message.count("lacks its numbers") == 10 and "more" in message
    assert stages.cli.export([str(step), str(tmp_path / "out"), "--weights", "ema"]) == 0


# Bad input


@pytest.mark.parametrize("format", LAYOUTS)
def test_nan_is_found_while_streaming_and_ten_tensors_are_named(folder: Path, tmp_path: Path, capsys: Any, format: str) -> None:
    weights = load_file(folder / "model.safetensors")
    for tensor in weights.values():
        tensor.view(-1)[-1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, tmp_path / "out", folder, tmp_path / "out", "--format", format)
    assert "NaN" in message and message.count("text_encoder/") == 10 and "…" in message


def test_what_float16_cannot_hold_is_said_as_such(folder: Path, tmp_path: Path, capsys: Any) -> None:
    weights = load_file(folder / "projector.safetensors")
    weights["fc1.weight"][0, 0] = 1e6
    save_file(weights, folder / "projector.safetensors", metadata={"format": "pt"})
    message = refused(capsys, tmp_path / "out", folder, tmp_path / "out", "--dtype", "fp16")
    assert "too large for float16 in projector/fc1.weight" in message


def test_a_missing_shard_a_foreign_key_and_an_index_that_leaves_the_folder(tmp_path: Path, capsys: Any) -> None:
    convert(StoredModel.open(PUBLISHED), tmp_path / "whole", shard_bytes=70_000)
    for change, expected in (("lost", "is missing"), ("outside", "beside it"), ("key", "missing lm_head.weight")):
        broken = shutil.copytree(tmp_path / "whole", tmp_path / change)
        index = read_json(broken / "model.safetensors.index.json")
        file = index["weight_map"]["lm_head.weight"]
        if change == "lost":
            (broken / file).unlink()
        elif change == "outside":
            index["weight_map"]["lm_head.weight"] = f"../whole/{file}"
            write_json(index, broken / "model.safetensors.index.json")
        else:
            held = load_file(broken / file)
            held["lm_head.wieght"] = held.pop("lm_head.weight")
            save_file(held, broken / file, metadata={"format": "pt"})
        assert expected in refused(capsys, tmp_path / "out", broken, tmp_path / "out", "--format", "diffusers")


@pytest.mark.parametrize(
    "name", ["projector/diffusion_pytorch_model.safetensors", "diffusion_head/config.json", "model_index.json"]
)
def test_a_broken_diffusers_folder_is_named(tmp_path: Path, capsys: Any, name: str) -> None:
    convert(StoredModel.open(PUBLISHED), tmp_path / "model", "diffusers")
    (tmp_path / "model" / name).write_bytes((tmp_path / "model" / name).read_bytes()[:40])
    message = refused(capsys, tmp_path / "out", tmp_path / "model", tmp_path / "out")
    assert name.partition("/")[0] in message or "projector.safetensors" in message
    (tmp_path / "model" / name).unlink()
    assert "missing" in refused(capsys, tmp_path / "out", tmp_path / "model", tmp_path / "out")


def test_another_pipeline_is_refused(tmp_path: Path, capsys: Any) -> None:
    convert(StoredModel.open(PUBLISHED), tmp_path / "model", "diffusers")
    write_json({"_class_name": "FluxPipeline"}, tmp_path / "model" / "model_index.json")
    assert "describes a FluxPipeline" in refused(capsys, tmp_path / "out", tmp_path / "model", tmp_path / "out")


def test_a_full_destination_stays_and_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "not empty" in refused(capsys, tmp_path / "full", PUBLISHED, tmp_path / "full")
    usage = shutil.disk_usage(tmp_path)._replace(free=10**5)
    with monkeypatch.context() as patch:
        patch.setattr(bitdance.folder.conversion.shutil, "disk_usage", lambda _: usage)
        assert "free; make room first" in refused(capsys, tmp_path / "out", PUBLISHED, tmp_path / "out")
    written: list[Path] = []

    def fail(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(bitdance.folder.conversion, "write_pieces", fail)
    assert "No space left" in refused(capsys, tmp_path / "out", PUBLISHED, tmp_path / "out")
    assert len(written) == 3


def test_what_is_no_source_and_what_a_source_cannot_give(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert "neither a checkpoint" in refused(capsys, out, tmp_path / "nothing", out)
    assert "no checkpoint" in refused(capsys, out, PUBLISHED, out, "--weights", "raw")
    for name in ("ae.safetensors", "ae_config.json"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(PUBLISHED / name, tmp_path / "tokenizer" / name)
    assert "a tokenizer alone" in refused(capsys, out, tmp_path / "tokenizer", out, "--format", "diffusers")
    assert stages.cli.export([str(tmp_path / "tokenizer"), str(out), "--dtype", "bf16"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["ae.safetensors", "ae_config.json", "conversion.json"]


# Memory

SHARDS, SHARD = 8, 64 * 2**20
MEASURE = """
import sys, torch
from pathlib import Path
from bitdance.folder.conversion import convert
from bitdance.folder.source import StoredModel
from bitdance.folder.stored import open_stored, pieces
def peak():  # not that of getrusage, which begins with the peak of the process that started this one
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
folder = Path(sys.argv[1])
files = sorted(folder.glob("model-*.safetensors"))
source = StoredModel(folder, {"backbone": {name: held for path in files for name, held in open_stored(path).items()}})
torch.zeros(2**20).to(torch.bfloat16).isfinite().all()
before = peak()
convert(source, Path(sys.argv[2]), "official", torch.bfloat16 if sys.argv[3] == "bf16" else None, shard_bytes=int(sys.argv[4]))
print(peak() - before)
whole = [torch.cat(list(pieces(held))) for path in files for held in open_stored(path).values()]
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("dtype", ["same", "bf16"])
def test_the_peak_is_less_than_two_shards(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "in").mkdir()
    write_json({"dtype": "float32"}, tmp_path / "in" / "config.json")
    for i in range(SHARDS):  # each a single tensor: the hardest case
        save_file({f"w{i}": torch.full((SHARD // 4,), float(i))}, tmp_path / "in" / f"model-{i}.safetensors")
    arguments = [sys.executable, "-c", MEASURE, tmp_path / "in", tmp_path / "out", dtype, str(SHARD)]
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=True)
    taken, whole = map(int, done.stdout.splitlines()[-2:])
    print(f"{SHARDS} shards of {SHARD:,} bytes, dtype {dtype}: {taken:,} bytes more at the peak")
    assert taken < 2 * SHARD and whole > SHARDS * SHARD, "the measure must see a model that is held whole"
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) == (SHARDS if dtype == "same" else SHARDS // 2)
    for held in (held for path in files for held in open_stored(path).items()):
        assert all(bool((piece == int(held[0][1:])).all()) for piece in pieces(held[1]))
