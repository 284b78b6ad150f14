"""SECURITY.md, "what is safe to open": absurd, broken and greedy files of a model folder end soon, in little memory, in an error
that names the file."""

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from strange_folders import GOLDEN, SMALL, change, golden

from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.folder.checkpoint import load_model
from bitdance.foreign import load_text_tokenizer
from bitdance.networks.backbone import Backbone
from bitdance.sequence.prompt import _QWEN2_SPLIT, conditional_ids
from bitdance.tokenizer_file import check_tokenizer
from lfq_tokenizer.json_file import read_json
from stages.cli import export

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
HUGE = (10**9, 10**400, 1e400, [1] * 2000, 1 << 20, 1024)
CHILD = """
import json, resource, shutil, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]), int(sys.argv[3])))
import torch
torch.set_num_threads(1)
from bitdance.folder.checkpoint import load_model
from bitdance.networks.backbone import Backbone
golden, folder = Path(sys.argv[1]), Path(sys.argv[2])
doors = {"load_model": lambda: load_model(folder, "cpu"), "Backbone": lambda: Backbone.from_pretrained(folder)}
slowest = 0.0
for file, keys, value, door in json.loads(sys.stdin.read()):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(golden, folder)
    content = json.loads((folder / file).read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / file).write_text(json.dumps(content))
    start, said = time.process_time(), ""
    try:
        doors[door]()
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert file in said or "safetensors" in said or str(folder) in said, said
        assert len(said) < 20_000
    spent = time.process_time() - start
    assert spent < 10, (file, keys, repr(value)[:50], door, spent)
memory = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024  # ru_maxrss begins with the starter's
assert memory < 1_500_000_000, memory
print("all refused or harmless")
"""


def run_child(cases: list[Any], tmp_path: Path, seconds: int = 120) -> None:
    """Each case in a process of bounded processor time: nothing hangs, nothing takes gigabytes."""
    arguments = [sys.executable, "-c", CHILD, str(GOLDEN), str(tmp_path / "model"), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(arguments, input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and "all refused or harmless" in found.stdout, found.stderr[-3000:]


def test_absurd_values_of_configs_end_soon_and_name_the_file(tmp_path: Path) -> None:
    places = [("config.json", [key], "load_model") for key in ("hidden_size", "num_hidden_layers", "vocab_size")]
    places += [("config.json", [key], "Backbone") for key in ("intermediate_size", "num_hidden_layers", "layer_types")]
    places += [("vision_head_config.json", [key], "load_model") for key in ("depth_latent", "parallel_num")]
    places += [("ae_config.json", ["ddconfig", key], "load_model") for key in ("ch_mult", "num_res_blocks", "out_ch")]
    places += [("tokenizer_config.json", ["model_max_length"], "load_model")]
    run_child([(file, keys, value, door) for file, keys, door in places for value in HUGE], tmp_path)


def test_a_config_of_a_larger_model_than_its_files_takes_no_memory(tmp_path: Path) -> None:
    """The library makes room for every weight that it misses; ours compares the counts first, whatever the family."""
    folder = golden(tmp_path / "model")
    for kind in ("qwen3", "llama", "olmo2"):
        change(folder, "config.json", model_type=kind, intermediate_size=1 << 22)
        with pytest.raises(ValueError, match=r"config\.json describes [\d,]+ numbers, and model\*\.safetensors hold [\d,]+"):
            Backbone.from_pretrained(folder)
    change(folder, "config.json", model_type="gptj", intermediate_size=None, max_position_embeddings=1 << 28)  # a table of 64 GB
    with pytest.raises(ValueError, match=r"config\.json describes [\d,]+ numbers"):
        Backbone.from_pretrained(folder)


def charsmap(text: str) -> str:
    import base64

    return base64.b64encode(struct.pack("<I", 4) + b"\0" * 4 + b"a\0" + text.encode() + b"\0").decode()


def chain(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
EMPTY = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}
BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": (chain(*[REPLACE] * 40), "times longer"),
    "between letters": (chain(*[EMPTY] * 40), "times longer"),
    "prefix": (chain(*[{"type": "Prepend", "prepend": "x" * 2000}] * 5), "times longer"),
    "bytes of bytes": (chain(*[{"type": "ByteLevel"}] * 30), "times longer"),
    "ligatures": (chain(*[{**EMPTY, "pattern": {"Regex": "."}, "content": "\ufdfa"}, {"type": "NFKD"}] * 5), "times longer"),
    "compiled": (chain({"type": "Precompiled", "precompiled_charsmap": charsmap("b" * 5000)}), "times longer"),
    "unknown normalizer": (chain({"type": "Surprise"}), "is not known"),
    "nested": (split("(a+)+$"), "repeats a group"),
    "nested deeper": (split("((a+))+$"), "repeats a group"),
    "alternatives": (split("(a|a)*$"), "repeats a group"),
    "in a row": (split("a*a*a*a*a*$"), "repetitions in a row"),
    "long pattern": (split("a" * 20_000), "characters"),
    "long piece": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a" * 100_000, -1.0]]}}, "characters"),
    "long word": ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9}}, "at most 200"),
    "many tokens": ({"added_tokens": [{"id": i, "content": f"<{i}>"} for i in range(70_000)]}, "added tokens"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_tokenizer_that_would_hang_or_grow_is_refused(tmp_path: Path, what: str) -> None:
    keys, said = BOMBS[what]
    folder = golden(tmp_path / "model")
    change(folder, "tokenizer.json", **keys)
    with pytest.raises(ValueError, match=said) as error:
        load_text_tokenizer(folder)
    assert "tokenizer.json" in str(error.value)


def test_patterns_and_normalizers_of_published_models_are_taken() -> None:
    published = [
        _QWEN2_SPLIT,
        _QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"),  # Llama
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",  # o200k
        r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM
    ]
    for pattern in published:
        check_tokenizer(split(pattern), "there")
    sentence = [{"type": "Precompiled", "precompiled_charsmap": charsmap("b" * 18)}]
    space = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    check_tokenizer(chain(*sentence, space, {"type": "Prepend", "prepend": "▁"}), "there")
    check_tokenizer(chain({"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}), "there")


def test_a_library_that_gives_up_on_a_prompt_is_an_error_of_that_prompt(tmp_path: Path) -> None:
    """Oniguruma stops after ten million steps, with a panic that is no `Exception`."""
    folder = golden(tmp_path / "model")
    change(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    change(folder, "tokenizer.json", **split("x?" * 40 + "x" * 40))
    tokenizer = load_text_tokenizer(folder)
    assert conditional_ids(tokenizer, "a cat")
    with contextlib.suppress(ValueError):  # or it is quick enough
        conditional_ids(tokenizer, "x" * 39)


def test_an_id_beyond_the_embedding_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = golden(tmp_path / "model")
    content = read_json(folder / "tokenizer.json")
    word = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][word] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    change(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(ValueError, match="has 4000000001 tokens, the backbone's embedding only"):
        load_model(folder, "cpu")


def broken_decoder(folder: Path, value: float, dtype: torch.dtype) -> Path:
    tensors = load_file(folder / "ae.safetensors")
    name = max(name for name in tensors if name.startswith("decoder.") and name.endswith("weight"))
    tensors[name] = torch.full_like(tensors[name], value)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / "ae.safetensors")
    return folder


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (6e4, "float16")])
def test_a_picture_that_is_no_picture_is_not_written(tmp_path: Path, value: float, dtype: str, capfd: Any) -> None:
    folder, out = broken_decoder(golden(tmp_path / "model"), value, getattr(torch, dtype)), tmp_path / "out"
    assert main(["generate", "a", "--model", str(folder), *SMALL, "--dtype", dtype, "-o", str(out)]) == 1
    assert f"NaN or infinity in {dtype}" in capfd.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["failures.jsonl"]
    rows = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and all("bitdance verify" in row["error"] for row in rows)
    pipe = BitDancePipeline.from_pretrained(folder, "cpu", dtype)
    with pytest.raises(ValueError, match=f"NaN or infinity in {dtype}; .*check the weights"):
        pipe("a", height=64, width=64, num_inference_steps=1, guidance_scale=1, seed=0)


CARDS: tuple[Any, ...] = (5, [], {"stages": 5}, {"stages": [1]}, {"figures": [{"what": 1}]}, {"limits": None}, {"training": 1})


@pytest.mark.parametrize("card", [*CARDS, {"language": 5}, {"stages": [{"mix": 5}]}])
def test_a_card_of_another_shape_is_named_by_its_key(tmp_path: Path, card: Any, capfd: Any) -> None:
    folder = golden(tmp_path / "model")
    change(folder, "bitdance.json", card=card)
    assert export([str(folder), str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    assert "bitdance.json: " in (said := capfd.readouterr().err) and "card" in said and said.count("\n") == 1


def test_defaults_that_mean_nothing_are_refused_with_their_file(tmp_path: Path, capfd: Any) -> None:
    folder = golden(tmp_path / "model")
    for defaults in ({"preset": "magic"}, {"num_inference_steps": 10**9}, {"guidance_scale": "7"}):
        change(folder, "bitdance.json", defaults=defaults)
        doors = (["generate", "a", *SMALL, "--model"], ["info"], ["doctor", "--model"])
        for door in doors:
            assert main([*door, str(folder)]) == 2 and "bitdance.json: " in capfd.readouterr().err
