"""The pack of ComfyUI as it is shipped: what is refused and how, schemas, help, workflows, metadata, the real ComfyUI."""

import ast
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import comfy_stub
import pytest
import torch
from comfy_models import MODELS, NAMES, QUICK, loaded, small_models, started

import comfyui_bitdance
from bitdance import __version__, load_pipeline
from bitdance.folder.adapters import PREFIX, A, B, adaptable
from bitdance.values import check_number
from lfq_tokenizer.json_file import write_json
from lfq_tokenizer.weights import write_safetensors

pytestmark = pytest.mark.slow

PACK = Path(comfyui_bitdance.__file__).parent
ROOT = PACK.parent
NODES = {"BitDanceLoadModel", "BitDanceEncode", "BitDanceGenerate", "BitDanceDecode", "BitDanceEdit"}
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
# what ComfyUI's inputs take beside their id, as far as it is used here
TAKEN = {
    "INT": {"default", "min", "max", "step", "control_after_generate"},
    "FLOAT": {"default", "min", "max", "step", "round"},
    "STRING": {"default", "multiline", "dynamic_prompts", "placeholder"},
    "COMBO": {"default", "options"},
}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.mktemp("pack") / "models")


@pytest.fixture
def host(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return started(models_dir, monkeypatch)


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", -8), ("height", 70_000), ("steps", -1), ("steps", 10_001), ("guidance", -0.5), ("guidance", float("nan"))]
    + [("seed", -1), ("seed", 2**63), ("n", 0), ("n", 100_001)],
)
def test_a_wrong_number_gets_the_words_of_the_library(host: comfy_stub.Host, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as expected:
        check_number(name, value)
    assert host.validate("BitDanceGenerate", prompt="a fox", **{name: value}) == str(expected.value)
    if name not in ("width", "height"):
        assert host.validate("BitDanceEdit", prompt="a fox", **{name: value}) == str(expected.value)
    with pytest.raises(ValueError, match="allowed") as said:  # a value that came from another node is checked when it is there
        host.run("BitDanceGenerate", model=loaded(host, "classes"), prompt="1", **{name: value})
    assert str(said.value) == str(expected.value)


def test_what_is_left_to_the_model_and_what_is_linked_is_not_wrong(host: comfy_stub.Host) -> None:
    assert host.validate("BitDanceGenerate", prompt="", width=0, height=0, steps=0, guidance=-1.0, seed=0, n=1) is True
    linked = dict.fromkeys(("prompt", "width", "height", "steps", "guidance", "preset", "seed", "n", "previews"))
    assert host.validate("BitDanceGenerate", **linked) is True
    assert host.validate("BitDanceGenerate", prompt="a fox", seed=2**63 - 1) is True  # the API may say more than a browser


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"preset": "fats"}, "preset = 'fats'; allowed are published"),
        ({"previews": 65}, "previews = 65; a whole number from 0 to 64 is allowed"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"negative": "\ud800"}, "surrogate"),
        ({"source": "\ud800"}, "surrogate"),
    ],
)
def test_other_wrong_values_say_what_is_allowed(host: comfy_stub.Host, inputs: dict[str, Any], words: str) -> None:
    for node in ("BitDanceGenerate", "BitDanceEdit")["source" in inputs :]:
        assert words in str(host.validate(node, **{"prompt": "a fox"} | inputs))


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        ("text", {"width": 40, "height": 32}, "is not supported"),
        ("text", {"preset": "GRN-B"}, "preset = 'GRN-B'; allowed are published, balanced"),
        ("classes", {"prompt": "red foks"}, "unknown class 'red foks'; nearest are red fox (2)"),
        ("classes", {"prompt": "10"}, "class = 10; a whole number from 0 to 9 is allowed"),
        ("classes", {"width": 32}, "width = 32; this model makes pictures of"),
        ("classes", {"preset": "fast"}, "preset = 'fast'; allowed are B-1x"),
        ("refine", {"preset": "published"}, "preset = 'published'; allowed are fixed, adaptive"),
        ("text", {"negative": "a ball"}, "negative is not for this kind of model; leave it out"),
        ("classes", {"negative": "a ball"}, "negative is not for this kind of model; leave it out"),
        ("refine", {"negative": "a ball"}, "negative_prompt = 'a ball'; a string is allowed, for models of prompts"),
        ("scales", {"steps": 3}, "the scales follow from the size, leave it out"),
    ],
)
def test_what_this_model_does_not_take_it_says_before_any_work(
    host: comfy_stub.Host, model: str, inputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match="^") as error:
        host.run("BitDanceGenerate", model=loaded(host, model), **{"prompt": MODELS[model][0]} | inputs)
    assert words in str(error.value) and host.updates == []


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            {"model": "nowhere"},
            "no model folder 'nowhere' in models/bitdance; known are: demo, classes, refine, refine_text, scales, text",
        ),
        ({"model": "../classes"}, "no model folder '../classes'"),
        ({"dtype": "float8"}, "dtype = 'float8'; allowed are float32, bfloat16, float16"),
        ({"quantize": "int3"}, "quantize = 'int3'; allowed are int8, int4"),
        ({"lora": "nowhere"}, "no adapter folder 'nowhere' in models/bitdance; known are: broken"),
        ({"lora": "broken"}, "adapter_config.json"),
        ({"model": "classes", "quantize": "int8"}, "quantize is not for the kind of model in classes; leave it out"),
        ({"model": "classes", "lora": "broken"}, "lora is not for the kind of model in classes; leave it out"),
    ],
)
def test_a_model_that_cannot_be_loaded_so_is_refused_at_once(host: comfy_stub.Host, inputs: dict[str, Any], words: str) -> None:
    adapter = host.models_dir / "bitdance" / "broken"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("[]")
    try:
        assert words in str(host.validate("BitDanceLoadModel", **{"model": "demo"} | inputs))
    finally:
        shutil.rmtree(adapter)


def test_dtype_quantisation_and_adapters_reach_the_loader(host: comfy_stub.Host) -> None:
    model = host.run("BitDanceLoadModel", model="classes", dtype="bfloat16")
    assert next(model.model.network.parameters()).dtype == torch.bfloat16
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'bitdance[quantize]'")
    assert host.validate("BitDanceLoadModel", model="text", quantize_head="int8", dtype="float32", lora_scale=2.0) is True
    quantized = host.run("BitDanceLoadModel", model="text", quantize_head="int8", dtype="float32")
    assert quantized.model.quantized == {"head": "int8"}


def test_an_adapter_is_added_as_the_library_does_it(host: comfy_stub.Host) -> None:
    folder, adapter = (host.models_dir / "bitdance" / name for name in ("text", "small"))
    name, linear = next(iter(dict(adaptable(loaded(host, "text").model)).items()))
    rows, columns = linear.weight.shape
    adapter.mkdir()
    write_json(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name.split(".")[-1]]}, adapter / "adapter_config.json"
    )
    tensors = {f"{PREFIX}{name}{A}": torch.rand(2, columns), f"{PREFIX}{name}{B}": torch.rand(rows, 2)}
    write_safetensors(tensors, adapter / "adapter_model.safetensors")
    inputs: dict[str, Any] = {"model": "text", "lora": "small", "lora_scale": 0.5}
    assert host.validate("BitDanceLoadModel", **inputs) is True
    assert "lora_scale = 1001" in str(host.validate("BitDanceLoadModel", **inputs | {"lora_scale": 1001.0}))
    found, expected = host.run("BitDanceLoadModel", **inputs), load_pipeline(folder, "cpu", lora=adapter, lora_scale=0.5)
    weights = [dict(adaptable(pipe.model))[name].weight for pipe in (found, expected, loaded(host, "text"))]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    before = host.nodes["BitDanceLoadModel"].fingerprint_inputs(**inputs)
    os.utime(adapter / "adapter_config.json", (1, 1))
    assert host.nodes["BitDanceLoadModel"].fingerprint_inputs(**inputs) != before
    shutil.rmtree(adapter)


def test_a_folder_that_changed_is_loaded_again(host: comfy_stub.Host) -> None:
    folder = host.models_dir / "bitdance" / "copy"
    shutil.copytree(host.models_dir / "bitdance" / "classes", folder)
    fingerprint = host.nodes["BitDanceLoadModel"].fingerprint_inputs
    inputs = {"model": "copy", "dtype": "auto", "quantize": "none", "quantize_head": "none", "lora": "none", "lora_scale": 1.0}
    before = fingerprint(**inputs)
    assert before == fingerprint(**inputs)
    os.utime(folder / "bitdance.json", (1, 1))
    assert fingerprint(**inputs) != before
    shutil.rmtree(folder)
    assert fingerprint(**inputs) == ""


def test_schemas_have_unique_ids_and_a_tooltip_everywhere(host: comfy_stub.Host) -> None:
    assert set(host.nodes) == NODES
    for node in host.nodes.values():
        schema = node.define_schema()
        sockets = [*schema.inputs, *schema.outputs]
        assert len({socket.id for socket in sockets}) == len(sockets)  # ComfyUI wants ids that inputs and outputs do not share
        assert schema.display_name.startswith("BitDance ") and schema.category == "BitDance" and schema.description.endswith(".")
        for socket in sockets:
            assert str(socket.options.get("tooltip", "")).endswith("."), (schema.node_id, socket.id)
            allowed = TAKEN.get(socket.kind, set()) | {"tooltip", "display_name"}
            assert set(socket.options) <= allowed, (schema.node_id, socket.id)
            if socket.is_widget:
                assert "default" in socket.options
                assert host.validate(schema.node_id, **{"model": "demo", socket.id: socket.options["default"]}) is True


def test_nodes_keep_nothing(host: comfy_stub.Host) -> None:
    model = loaded(host, "classes")
    before = {name: dict(vars(node)) for name, node in host.nodes.items()}
    host.run("BitDanceDecode", model=model, bits=host.run("BitDanceGenerate", model=model, prompt="1", **QUICK))
    assert {name: dict(vars(node)) for name, node in host.nodes.items()} == before


def test_every_node_has_help_that_names_its_inputs(host: comfy_stub.Host) -> None:
    folder = PACK / comfyui_bitdance.WEB_DIRECTORY / "docs"
    assert {path.stem for path in folder.glob("*.md")} == NODES
    for name, node in host.nodes.items():
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        first = re.findall(r"^\| ([\w, ]+) \|", text, re.MULTILINE)
        told = {word for cell in first for word in cell.split(", ")} - {"input"}
        assert told == {socket.id for socket in node.define_schema().inputs}
        assert "Output: **" in text


def as_prompt(workflow: dict[str, Any], host: comfy_stub.Host) -> dict[str, dict[str, Any]]:
    """A workflow as the page of ComfyUI saves it → in the form of the API: links by name, widgets in the order of the schema, and
    after a seed what becomes of it."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        inputs: dict[str, Any] = {}
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                _, source, output, target, index, kind = links[socket["link"]]
                assert (target, index, kind) == (node["id"], slot, socket["type"])
                origin = next(other for other in workflow["nodes"] if other["id"] == source)["outputs"][output]
                assert socket["link"] in origin["links"] and origin["type"] == kind
                inputs[socket["name"]] = [str(source), output]
        if node["type"] in host.nodes:
            schema, values = host.nodes[node["type"]].define_schema(), list(node["widgets_values"])
            named = [(socket["name"], socket["type"]) for socket in node["inputs"]]
            assert named == [(s.id, s.kind) for s in schema.inputs if not s.is_widget]
            assert [output["type"] for output in node["outputs"]] == [s.kind for s in schema.outputs]
            for socket in (socket for socket in schema.inputs if socket.is_widget):
                inputs[socket.id] = values.pop(0)
                if socket.options.get("control_after_generate"):
                    assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
            assert values == []
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_schemas_and_run(host: comfy_stub.Host, path: Path) -> None:
    prompt = as_prompt(json.loads(path.read_text(encoding="utf-8")), host)
    stand_ins = {"my-class-model": ("classes", "red fox"), "my-refinement-model": ("refine_text", "a red cube")}
    size = 16  # of what the stand-in makes
    for node in prompt.values():
        if node["class_type"] == "BitDanceLoadModel" and node["inputs"]["model"] in stand_ins:
            node["inputs"]["model"], text = stand_ins[node["inputs"]["model"]]
            size = loaded(host, node["inputs"]["model"]).model.sizes[0][0]
            for other in prompt.values():
                other["inputs"] |= {"prompt": text} if "prompt" in other["inputs"] else {}
        if node["class_type"] in ("BitDanceGenerate", "BitDanceEdit"):
            node["inputs"]["steps"] = 5  # the rest is as shipped
    mask = torch.zeros(1, size, size)
    mask[:, : size // 2] = 1
    outside = {"LoadImage": (torch.rand(1, size, size, 3), mask), "ImageScale": (torch.rand(1, 64, 64, 3),)}
    results = host.queue(prompt, outside)
    (shown,) = next(results[key] for key, node in prompt.items() if node["class_type"] == "PreviewImage")
    assert shown.ndim == 4 and shown.shape[3] == 3 and 0 <= float(shown.min()) <= float(shown.max()) <= 1
    assert len(NAMES) == 10 and {node["class_type"] for node in prompt.values()} & NODES


def test_the_workflow_of_the_guide_runs(host: comfy_stub.Host) -> None:
    text = (ROOT / "docs" / "comfyui" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    prompt = json.loads(block)
    prompt["2"]["inputs"]["steps"] = 1
    results = host.queue(prompt, {})
    assert results["3"][0].shape == (1, 96, 96, 3) and torch.equal(results["4"][0], results["3"][0])


def test_the_metadata_names_no_torch_and_the_package_is_shipped_whole() -> None:
    said = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    assert said["project"]["dependencies"] == ["bitdance"] and said["project"]["version"] == __version__
    assert "comfyui" not in said["project"]["name"].lower() and {"PublisherId", "DisplayName"} <= set(said["tool"]["comfy"])
    assert not (PACK / "requirements.txt").exists()
    listed = re.search(r'"comfyui_bitdance": (\[.*?\])', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert listed is not None
    shipped = {path for pattern in ast.literal_eval(listed[1]) for path in PACK.glob(pattern)} | set(PACK.glob("*.py"))
    every = {path for path in PACK.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert every == shipped


def test_nothing_is_evaluated_or_installed() -> None:
    """The registry of ComfyUI refuses packs that do."""
    for path in PACK.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "compile", "os.system"), path.name
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "subprocess" not in ast.unparse(node), path.name


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=300)


def test_outside_of_comfyui_it_imports_and_says_where_it_belongs() -> None:
    code = "import comfyui_bitdance, sys; assert 'torch' not in sys.modules; "
    code += "import asyncio; asyncio.run(comfyui_bitdance.comfy_entrypoint())"
    done = python(code)
    assert done.returncode == 1
    assert "ImportError: these nodes work inside ComfyUI (0.3.64 or newer)" in done.stderr


def test_without_the_library_it_says_how_to_get_it(host: comfy_stub.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitdance", None)
    with pytest.raises(ImportError, match="need the package bitdance in ComfyUI's own Python: python -m pip install"):
        asyncio.run(comfyui_bitdance.comfy_entrypoint())


REAL = """
import asyncio, importlib.util, os, sys
home, pack = os.environ["COMFYUI_PATH"], os.environ["PACK"]
sys.path.insert(0, home)
os.chdir(home)
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch

place = os.path.join(pack, "__init__.py")
spec = importlib.util.spec_from_file_location("a_name_of_its_own", place, submodule_search_locations=[pack])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
extension = asyncio.run(module.comfy_entrypoint())
asyncio.run(extension.on_load())
nodes = {}
for node in asyncio.run(extension.get_node_list()):
    schema = node.GET_SCHEMA()
    schema.validate()
    node.VALIDATE_CLASS()
    assert set(node.INPUT_TYPES()) >= {"required"}
    nodes[schema.node_id] = node

def run(name, **inputs):
    return nodes[name].EXECUTE_NORMALIZED(**inputs).args[0]

own = "model's own"
with torch.inference_mode():
    loading = {"quantize": "none", "quantize_head": "none", "lora": "none", "lora_scale": 1.0}
    model = run("BitDanceLoadModel", model="demo", dtype="float32", **loading)
    run_ = {"width": 0, "height": 0, "steps": 1, "guidance": 1.0, "preset": own, "seed": 1, "n": 1, "previews": 2}
    bits = run("BitDanceGenerate", model=model, prompt="a fox", **run_)
    image = run("BitDanceDecode", model=model, bits=bits)
    again = run("BitDanceEncode", model=model, image=image)
print(sorted(nodes), tuple(image.shape), tuple(again.tokens.shape))
"""


def test_the_real_comfyui_takes_the_nodes() -> None:
    if not (home := os.environ.get("COMFYUI_PATH")):
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    done = python(REAL, COMFYUI_PATH=home, PACK=str(PACK))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in NODES) and "(1, 96, 96, 3)" in done.stdout
