"""Model folders: read strictly, written whole or not at all."""

import json
import shutil

import pytest
import torch
import transformers.modeling_utils
from golden_cases import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bitdance.folder.checkpoint
import bitdance.folder.config
import lfq_tokenizer.files
from bitdance.folder.checkpoint import load_model, save_model
from bitdance.folder.config import check_folder
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.settings import Sampling
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors, read_shapes

pytestmark = pytest.mark.slow

PUBLISHED = GOLDEN / "t2i_ckpt"
WEIGHTS = ("ae.safetensors", "vision_head.safetensors", "projector.safetensors", "model.safetensors")
CONFIGS = ("ae_config.json", "vision_head_config.json", "config.json")


@pytest.fixture(scope="module")
def model():
    return load_model(PUBLISHED, "cpu")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(PUBLISHED, tmp_path / "model", copy_function=shutil.copyfile)


def tensors(model):
    parts = {"ae": model.tokenizer, "head": model.head, "projector": model.projector, "lm": model.backbone.lm}
    return {f"{name}.{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}


def assert_same_weights(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def some_bits(model):
    return generate_bits(model, ["a red cube"], 4, 4, Sampling(3, 3.0), [torch.Generator().manual_seed(1)])


def nothing_big_is_read(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("weights were read before all files were checked")

    for name in ("read_safetensors", "_load"):
        monkeypatch.setattr(bitdance.folder.checkpoint, name, fail)
    monkeypatch.setattr(bitdance.folder.checkpoint.LFQTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(bitdance.folder.checkpoint.Backbone, "from_pretrained", fail)


def test_published_weights_arrive_unchanged_and_as_float32_on_cpu(model):
    found = tensors(model)
    assert {t.dtype for t in found.values()} == {torch.float32}
    for name, part in zip(WEIGHTS, ("ae", "head", "projector", "lm"), strict=True):
        for key, t in read_safetensors(PUBLISHED / name).items():
            assert torch.equal(found.pop(f"{part}.{key}"), t.float())
    assert not found and not model.training and model.extras == {}


def test_saved_model_comes_back_equal_and_draws_the_same_bits(model, tmp_path):
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu")
    assert_same_weights(model, again)
    assert torch.equal(some_bits(model), some_bits(again))
    text = "Two cats, 3 dogs & one bird: 雪山日落!<|im_start|>"
    assert model.text_tokenizer.encode(text) == again.text_tokenizer.encode(text)
    assert model.special == again.special
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_saved_model_has_the_published_layout(model, tmp_path):
    save_model(model, tmp_path / "saved", dtype=torch.bfloat16)
    for name in WEIGHTS:
        assert read_shapes(tmp_path / "saved" / name) == read_shapes(PUBLISHED / name)
        assert {t.dtype for t in read_safetensors(tmp_path / "saved" / name).values()} == {torch.bfloat16}
    for name in CONFIGS[:2]:
        assert read_json(tmp_path / "saved" / name) == read_json(PUBLISHED / name)
    published, saved = read_json(PUBLISHED / "config.json"), read_json(tmp_path / "saved" / "config.json")
    for key in ("hidden_size", "num_hidden_layers", "head_dim", "rope_theta", "vocab_size", "model_type", "dtype"):
        assert saved[key] == published[key]
    assert not (tmp_path / "saved" / "bitdance.json").exists()
    assert tensors(model)["lm.model.norm.weight"].dtype == torch.float32, "the model in memory stays as it was"
    assert_same_weights(model, load_model(tmp_path / "saved", "cpu"))  # these weights are exact in bfloat16


def test_no_path_of_this_machine_is_saved(folder, tmp_path):
    save_model(load_model(folder, "cpu"), tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_bfloat16_in_memory_is_saved_and_loaded_as_such(tmp_path):
    model = load_model(PUBLISHED, "cpu", torch.bfloat16)
    save_model(model, tmp_path / "saved")
    assert_same_weights(model, load_model(tmp_path / "saved", "cpu", torch.bfloat16))


def test_extras_travel_with_the_model(model, folder, tmp_path):
    extras = {"defaults": {"height": 64, "width": 64, "num_inference_steps": 3}, "sizes": [[64, 64]], "prompts": ["ä"]}
    write_json(extras, folder / "bitdance.json")
    loaded = load_model(folder, "cpu")
    assert loaded.extras == extras
    save_model(loaded, tmp_path / "saved")
    assert load_model(tmp_path / "saved", "cpu").extras == extras


def split(folder, names=("a.safetensors", "b.safetensors")):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(weights))}
    for name in set(names):
        save_file({k: weights[k] for k in weights if weight_map[k] == name}, folder / name, metadata={"format": "pt"})
    write_json({"metadata": {"total_size": 0}, "weight_map": weight_map}, folder / "model.safetensors.index.json")


def test_a_backbone_in_several_files_loads(model, folder):
    split(folder, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    assert_same_weights(model, load_model(folder, "cpu"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin"])
def test_an_index_pointing_outside_the_folder_is_refused(folder, monkeypatch, name):
    split(folder)
    index = read_json(folder / "model.safetensors.index.json")
    shutil.copyfile(folder / "a.safetensors", folder.parent / "outside.safetensors")
    index["weight_map"]["lm_head.weight"] = name
    write_json(index, folder / "model.safetensors.index.json")
    nothing_big_is_read(monkeypatch)
    with pytest.raises(ValueError, match="beside it"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("name", [*WEIGHTS, *CONFIGS])
def test_a_missing_file_is_named_before_anything_big_is_read(folder, monkeypatch, name):
    (folder / name).unlink()
    nothing_big_is_read(monkeypatch)
    with pytest.raises(FileNotFoundError, match=name):
        load_model(folder, "cpu")


@pytest.mark.parametrize("name", [*WEIGHTS, *CONFIGS])
@pytest.mark.parametrize("keep", [0, 7, 0.5])
def test_a_truncated_file_is_named_before_anything_big_is_read(folder, monkeypatch, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    nothing_big_is_read(monkeypatch)
    with pytest.raises(ValueError, match=name):
        load_model(folder, "cpu")


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_tensors_are_listed_ten_at_most(folder, monkeypatch, name):
    weights = load_file(folder / name)
    changed = {f"x{i:02}": t for i, t in enumerate(weights.values())} | {"y": torch.zeros(1)}
    save_file(changed, folder / name, metadata={"format": "pt"})
    nothing_big_is_read(monkeypatch)
    shown = name if name != "model.safetensors" else "model"
    with pytest.raises(ValueError, match=shown) as caught:
        load_model(folder, "cpu")
    problems = 2 * len(weights) + 1
    assert str(caught.value).count("missing ") + str(caught.value).count("unexpected ") == min(10, problems)
    assert ("more" in str(caught.value)) == (problems > 10)


def test_a_wrong_shape_names_tensor_and_both_shapes(folder):
    weights = load_file(folder / "projector.safetensors")
    weights["fc1.bias"] = torch.zeros(65)
    save_file(weights, folder / "projector.safetensors")
    with pytest.raises(ValueError, match=r"projector.safetensors.*fc1.bias has shape \[65\], expected \[64\]"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vision_head_config.json", {"ch_target": 16}, "ch_target = 16, but z_channels = 8"),
        ("vision_head_config.json", {"ch_cond": 32}, "ch_cond = 32, but hidden_size = 64"),
        ("vision_head_config.json", {"ch_latnet": 32}, "vision_head_config.json: unknown keys"),
        ("vision_head_config.json", {"parallel_num": 256}, "query"),
        ("config.json", {"vocab_size": 900}, "embed_tokens.weight has shape"),
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ("bitdance.json", {"sizes": [[64]]}, "bitdance.json"),
        ("bitdance.json", {"sizes": [[65, 64]]}, "multiples of 16"),
    ],
)
def test_configs_that_do_not_fit_are_errors_before_anything_big_is_read(folder, monkeypatch, name, change, message):
    path = folder / name
    write_json({**(read_json(path) if path.exists() else {}), **change}, path)
    nothing_big_is_read(monkeypatch)
    with pytest.raises(ValueError, match=message):
        load_model(folder, "cpu")


def test_mutated_headers_raise_nothing_but_our_errors(folder):
    data = (folder / "projector.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(200):
        place, value = (int(torch.randint(n, (), generator=generator)) for n in (header, 256))
        (folder / "projector.safetensors").write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            bitdance.folder.config._check_weights(
                lambda: bitdance.folder.config.Projector(8, 64), folder / "projector.safetensors"
            )
        except ValueError as error:
            assert "projector.safetensors" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["nowhere", "demon", "org/model"])
def test_a_folder_that_is_not_there_says_what_was_looked_for(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_model(name)
    assert name in str(caught.value) and "demo" in str(caught.value)


def test_demo_is_the_bundled_folder(folder, monkeypatch):
    monkeypatch.setattr(bitdance.folder.config, "DEMO", folder)
    assert bitdance.folder.checkpoint.resolve("demo") == folder


def test_a_full_folder_is_not_overwritten_unless_asked(model, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        save_model(model, tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["thesis.txt"]
    save_model(model, tmp_path / "saved", overwrite=True)
    check_folder(tmp_path / "saved")
    assert not (tmp_path / "saved" / "thesis.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(model, tmp_path, monkeypatch, overwrite):
    if overwrite:
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "old.txt").write_text("old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(bitdance.folder.checkpoint, "write_safetensors", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, tmp_path / "saved", overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == (["saved", "old.txt"] if overwrite else [])


def test_a_disk_that_is_too_small_is_noticed_beforehand(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(lfq_tokenizer.files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs \d+\.\d MB and the disk has 1\.0 MB free"):
        save_model(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_model_for_generation_only_generates_and_refuses_to_be_saved(model, tmp_path):
    lean = load_model(PUBLISHED, "cpu", generation_only=True)
    assert lean.tokenizer.encoder is None
    assert torch.equal(some_bits(lean), some_bits(model))
    with pytest.raises(ValueError, match="generation_only=False"):
        save_model(lean, tmp_path / "saved")


def test_generation_never_reads_the_text_output(monkeypatch):
    asked = []

    class Slice:
        def __init__(self, name, whole):
            self.name, self.whole = name, whole

        def __getattr__(self, name):
            return getattr(self.whole, name)

        def __getitem__(self, index):
            asked.append(self.name)
            return self.whole[index]

    class File(Slice):
        """A safetensors file that notes the tensors whose bytes are asked for."""

        def __init__(self, *args, **kwargs):
            super().__init__("", safe_open(*args, **kwargs))

        def __enter__(self):
            self.whole.__enter__()
            return self

        def __exit__(self, *error):
            return self.whole.__exit__(*error)

        def get_slice(self, name):
            return Slice(name, self.whole.get_slice(name))

        def get_tensor(self, name):
            asked.append(name)
            return self.whole.get_tensor(name)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    lean = load_model(PUBLISHED, "cpu", generation_only=True)
    assert "model.embed_tokens.weight" in asked and "lm_head.weight" not in asked
    assert not lean.backbone.has_output_head and not any("lm_head" in name for name in lean.state_dict())
    with pytest.raises(ValueError, match="output_head=True"):
        lean.backbone.logits(torch.zeros(1, 64))
    load_model(PUBLISHED, "cpu")
    assert "lm_head.weight" in asked


def test_a_text_output_tied_to_the_embedding_stays():
    lean, whole = (load_model("demo", "cpu", generation_only=value) for value in (True, False))
    assert lean.backbone.has_output_head
    assert lean.backbone.lm.state_dict().keys() == whole.backbone.lm.state_dict().keys()


def test_strange_weights_are_an_error_for_generation_too(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.strange": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected model.strange"):
        bitdance.folder.checkpoint.Backbone.from_pretrained(folder, output_head=False)


def test_an_integer_dtype_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        load_model(PUBLISHED, "cpu", torch.int8)


def test_files_written_are_plain_json(model, tmp_path):
    save_model(model, tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
