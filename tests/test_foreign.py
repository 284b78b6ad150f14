"""SECURITY.md, "what is safe to open": a model folder of a stranger runs no code, asks nothing, opens no connection and makes
nobody read what lies outside of it."""

import io
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from strange_folders import GOLDEN, SMALL, change, golden

from bitdance import BitDancePipeline
from bitdance.cli import main
from bitdance.folder.adapters import Adapter
from bitdance.folder.checkpoint import load_model
from bitdance.foreign import LM_KEYS, TOKENIZER_KEYS, load_text_tokenizer
from bitdance.networks.backbone import Backbone
from distill.config import DistillTraining
from distill.teacher import Teacher
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_json
from stages.cli import export
from stages.config import GeneratorTraining
from stages.recipes.generator.start import start_model

pytestmark = pytest.mark.slow


def command(*arguments: object) -> Callable[[Path], int]:
    """A door of the command line; MODEL stands for the folder."""
    return lambda folder: main([str(folder if a == "MODEL" else a).replace("OUT", str(folder.parent / "out")) for a in arguments])


def exported(folder: Path) -> int:
    return export([str(folder), str(folder.parent / "exported")])


def trained(**how: str) -> Callable[[Path], Any]:
    def start(folder: Path) -> Any:
        said = {name: str(folder if value == "MODEL" else value) for name, value in how.items()}
        return start_model(GeneratorTraining(**said, head=HEAD), lambda: ["a"], torch.float32)  # type: ignore[arg-type]

    return start


HEAD = {"ch_latent": 128, "depth_latent": 1, "depth_adanln": 1, "parallel_num": 4}
# door → what goes through it; every one reads a folder that anyone may have made
DOORS: dict[str, Callable[[Path], Any]] = {
    "generate": command("generate", "a", "--model", "MODEL", *SMALL, "-o", "OUT"),
    "info": command("info", "MODEL", "--json"),
    "sizes": command("sizes", "MODEL"),
    "verify": command("verify", "MODEL"),
    "verify --against": command("verify", GOLDEN, "--against", "MODEL"),
    "doctor": command("doctor", "--model", "MODEL", "--device", "cpu"),
    "bench": command("bench", "--model", "MODEL", "--floor", "1e12,1e12"),
    "export": exported,
    "from_pretrained": BitDancePipeline.from_pretrained,
    "load_model": load_model,
    "LFQTokenizer": LFQTokenizer.from_pretrained,
    "Backbone": Backbone.from_pretrained,
    "text tokenizer": load_text_tokenizer,
    "generator.pretrained": trained(tokenizer=str(GOLDEN), pretrained="MODEL"),
    "generator.init": lambda folder: start_model(GeneratorTraining(init=str(folder)), lambda: ["a"], torch.float32),
    "distill": lambda folder: Teacher.load(DistillTraining(teacher=str(folder))),
}


def outcome(door: str, folder: Path, capfd: Any) -> str:
    """ "" where the folder was taken, else the one message of its refusal, which is a ValueError or exit code 2 (verify: 1)."""
    for name in ("out", "exported"):
        shutil.rmtree(folder.parent / name, ignore_errors=True)
    capfd.readouterr()
    try:
        code = DOORS[door](folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    shown = capfd.readouterr()
    if not isinstance(code, int) or code == 0:
        return ""
    assert code == 2 or (code == 1 and door in ("verify", "doctor")), (door, code, shown)
    assert "Traceback" not in shown.err
    return shown.err if code == 2 else shown.out


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection can be opened, and whoever asks gets the answer yes."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))


CODE = "from pathlib import Path\nPath({canary!r}).write_text('ran')\n"
ASKS: dict[str, dict[str, dict[str, Any]]] = {  # what → file → keys
    "auto_map": {"config.json": {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"}},
    "auto_map of a known family": {"config.json": {"auto_map": {"AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}}},
    "what nobody hears": {
        "config.json": {
            **dict.fromkeys(("attn_implementation", "_attn_implementation", "experts_implementation"), "evil/kernel"),
            **dict.fromkeys(("_experts_implementation", "_attn_implementation_internal"), "evil/kernel"),
            **{"use_kernels": True, "kernel_config": {"RMSNorm": "evil/kernel:Norm"}, "custom_generate": "evil"},
            **{"trust_remote_code": True, "architectures": ["evil.M"], "_name_or_path": "evil/m"},
        },
        "tokenizer_config.json": {
            **{"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilTokenizer"},
            **dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file", "name_or_path", "gguf_file"), "/etc/passwd"),
            "sp_model_kwargs": {"model_file": "/etc/passwd"},
            "chat_template": "{% for a in range(999999999) %}{{ cycler.__init__.__globals__ }}{% endfor %}",
        },
        "special_tokens_map.json": {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"},
        "generation_config.json": {"custom_generate": "evil", "trust_remote_code": True, "cache_implementation": "evil/kernel"},
        "adapter_config.json": {"base_model_name_or_path": "evil/model", "peft_type": "LORA", "auto_mapping": {"a": "evil"}},
        "processor_config.json": {"auto_map": {"AutoProcessor": "evil.P"}},
    },
    "quantised": {"config.json": {"quantization_config": {"quant_method": "custom", "modules": "evil"}}},
    "pipeline": {"model_index.json": {"_class_name": ["pipeline", "Evil"], "text_encoder": ["evil", "M"]}},
}
TAKEN = {"what nobody hears"}  # the others are refused


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, Path]]]:
    """`hostile(what)` → a model folder with that wish and code for it, and the file that the code would write."""
    home = tmp_path_factory.mktemp("hostile")
    canary = home / "canary"
    (home / "path" / "kernels").mkdir(parents=True)
    code = CODE.format(canary=str(canary))
    (home / "path" / "kernels" / "__init__.py").write_text(code + "def get_kernel(*a, **k): raise AssertionError\n")

    def make(what: str) -> tuple[Path, Path]:
        folder = home / what.replace(" ", "-") / "model"
        if not folder.exists():
            golden(folder)
            for name in ("evil", "pipeline", "modeling_evil", "configuration_evil", "tokenization_evil", "sitecustomize"):
                (folder / f"{name}.py").write_text(code)
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(code)
            for file, keys in ASKS[what].items():
                change(folder, file, **keys)
        return folder, canary

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "path"))
        yield make


@pytest.mark.parametrize("what", ASKS)
def test_no_code_runs_nobody_is_asked_and_no_connection_is_opened(hostile: Any, what: str, alone: None, capfd: Any) -> None:
    folder, canary = hostile(what)
    refused = {door: outcome(door, folder, capfd) for door in DOORS}
    assert not canary.exists(), canary.read_text()
    assert "kernels" not in sys.modules
    if what in TAKEN:
        assert not any(refused.values()), refused
    else:
        assert refused["generate"] and refused["load_model"] and refused["from_pretrained"], refused
        assert all(str(folder) in text for text in refused.values() if text), refused
    assert not list(folder.parent.glob("exported/*.py"))


def test_keys_that_are_on_no_list_never_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, PreTrainedConfig

    folder = golden(tmp_path / "model")
    change(folder, "config.json", surprise=1, _attn_implementation="evil/kernel", use_kernels=True)
    change(folder, "tokenizer_config.json", surprise=1, auto_map={"AutoTokenizer": ["evil.T", None]})
    change(folder, "special_tokens_map.json", surprise=1)
    change(folder, "generation_config.json", surprise=1, custom_generate="evil")
    arrived: set[str] = set()
    seen: list[set[str]] = []
    before, tokenizer = PreTrainedConfig.__setattr__, AutoTokenizer.from_pretrained

    def spy(self: Any, name: str, value: Any) -> None:
        arrived.add(name)
        before(self, name, value)

    def look(place: str, *arguments: Any, **options: Any) -> Any:
        files = {path.name: path for path in Path(place).iterdir()}
        seen.extend(set(read_json(files[name])) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"))
        assert options["trust_remote_code"] is False and options["local_files_only"] is True
        return tokenizer(place, *arguments, **options)

    monkeypatch.setattr(PreTrainedConfig, "__setattr__", spy)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", look)
    model = load_model(folder, "cpu")
    assert "surprise" not in arrived and "use_kernels" not in arrived
    assert model.backbone.lm.config._attn_implementation == "bitdance"
    assert len(seen) == 3 and set().union(*seen[:2]) <= set(TOKENIZER_KEYS) and seen[2] <= {"model_type", *LM_KEYS}
    assert not hasattr(model.backbone.lm.generation_config, "surprise")


FILES = sorted(path.name for path in GOLDEN.iterdir())


@pytest.mark.parametrize("file", [*FILES, "loop.txt", "nowhere.jinja", "folder"])
def test_a_link_out_of_the_folder_is_refused_by_every_door(tmp_path: Path, file: str, capfd: Any) -> None:
    folder, outside = golden(tmp_path / "model"), tmp_path / "secret"
    outside.mkdir()
    if (folder / file).exists():
        (folder / file).rename(outside / file)
    target = {"loop.txt": "loop.txt", "nowhere.jinja": "/no/such/file", "folder": str(outside)}.get(file, str(outside / file))
    (folder / file).symlink_to(target)
    refused = {door: outcome(door, folder, capfd) for door in DOORS}
    assert all(file in text and "is a link that leads" in text for text in refused.values()), refused
    assert not (tmp_path / "exported").exists() and not (tmp_path / "out").exists()


def diffusers(folder: Path) -> Path:
    assert export([str(GOLDEN), str(folder), "--format", "diffusers"]) == 0
    return folder


def test_a_link_out_of_any_layout_is_refused(tmp_path: Path, capfd: Any) -> None:
    whole = diffusers(tmp_path / "whole")
    (tmp_path / "secret").mkdir()
    places = ("text_encoder/config.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors", "model_index.json")
    for place in (*places, "autoencoder/diffusion_pytorch_model.safetensors", "tokenizer", "projector"):
        folder = Path(shutil.copytree(whole, tmp_path / "model"))
        (folder / place).rename(tmp_path / "secret" / Path(place).name)
        (folder / place).symlink_to(tmp_path / "secret" / Path(place).name)
        refused = {door: outcome(door, folder, capfd) for door in ("generate", "export", "verify", "info", "load_model")}
        assert all("is a link that leads out of" in text for text in refused.values()), (place, refused)
        shutil.rmtree(folder), shutil.rmtree(tmp_path / "secret"), (tmp_path / "secret").mkdir()


def test_an_index_names_files_beside_itself_alone(tmp_path: Path, capfd: Any) -> None:
    folder = golden(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    tensors = list(load_file(tmp_path / "secret.safetensors"))
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..\\secret.safetensors", ["a"], None, "x.bin"):
        change(folder, "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, name))
        refused = {door: outcome(door, folder, capfd) for door in ("generate", "export", "verify", "info", "Backbone")}
        assert all("model.safetensors.index.json" in text for text in refused.values()), (name, refused)
    alone = tmp_path / "tokenizer"  # a folder of a tokenizer alone has an index of its own
    alone.mkdir()
    shutil.copy(GOLDEN / "ae_config.json", alone)
    for stem in ("ae", "model"):
        change(alone, f"{stem}.safetensors.index.json", weight_map={"a": "../secret.safetensors"})
        refused = {door: outcome(door, alone, capfd) for door in ("export", "info")}
        assert ".safetensors" in refused["info"] and (stem == "model" or "points to" in refused["export"]), refused
        (alone / "ae.safetensors.index.json").unlink(missing_ok=True)
        shutil.copy(GOLDEN / "ae.safetensors", alone)
        if stem == "model":
            assert "model.safetensors.index.json points to" in refused["info"]


def test_links_inside_a_folder_and_in_a_hub_cache_are_followed(tmp_path: Path, capfd: Any) -> None:
    folder = golden(tmp_path / "model")
    for file in ("model.safetensors", "tokenizer.json"):
        (folder / file).rename(folder / f"real-{file}")
        (folder / file).symlink_to(f"real-{file}")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, path in enumerate(GOLDEN.iterdir()):
        shutil.copy(path, blobs / f"{number:02d}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:02d}")
    for place in (folder, snapshot):
        for door in ("generate", "export", "verify", "info", "load_model"):
            assert outcome(door, place, capfd) == "", (place, door)


def test_an_adapter_folder_holds_to_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    change(folder, "adapter_config.json", peft_type="LORA", r=2, lora_alpha=2, bias="none", base_model_name_or_path="evil/model")
    layer = "base_model.model.backbone.lm.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": torch.zeros(2, 64), f"{layer}.lora_B.weight": torch.zeros(64, 2)}
    save_file(weights, folder / "adapter_model.safetensors")
    assert Adapter.read(folder).factor == 1
    (folder / "adapter_model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is a link that leads out of"):
        Adapter.read(folder)
