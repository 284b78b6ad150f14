"""A stand-in for the part of ComfyUI that comfyui_bitdance touches: the names of its API, and how a workflow is checked and run.

As in ComfyUI an input that another node gives is None while inputs are validated, a value is checked against the schema only
where the node does not validate it itself, and nodes run in inference mode.
"""

import inspect
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

WIDGETS = {"Int": "INT", "Float": "FLOAT", "String": "STRING", "Combo": "COMBO"}


class Interrupted(Exception):
    """What ComfyUI raises in a node when a user stops the run."""


class Socket:
    """An input or an output; `options` are what the schema says of it."""

    def __init__(self, kind: str, id: str, optional: bool = False, **options: Any) -> None:
        self.kind, self.id, self.optional, self.options = kind, id, optional, options
        self.is_widget = kind in WIDGETS.values()


def custom(kind: str) -> Any:
    def socket(*args: Any, **options: Any) -> Socket:
        return Socket(kind, *args, **options)

    return SimpleNamespace(Input=socket, Output=socket, io_type=kind)


class Schema(SimpleNamespace):
    """What a node says of itself."""


class NodeOutput:
    def __init__(self, *args: Any) -> None:
        self.args = args


class ComfyNode:
    """A node; ComfyUI locks its class, so that nothing can be kept in it."""


class Host:
    """ComfyUI as a test sees it: `updates` are the calls of the progress bar; after `stop_after` of them the user stops."""

    def __init__(self, models_dir: Path) -> None:
        self.models_dir, self.updates, self.stop_after = models_dir, list[tuple[int, int, Any]](), 10**9
        self.places, self.nodes, self.room = dict[str, list[str]](), dict[str, Any](), 0

    def interrupted(self) -> None:
        if len(self.updates) >= self.stop_after:
            raise Interrupted

    def validate(self, node_id: str, **inputs: Any) -> bool | str:
        """What ComfyUI says of these widgets before it runs anything: True or what is wrong."""
        node = self.nodes[node_id]
        sockets = node.define_schema().inputs
        own: Collection[str] = ()
        if hasattr(node, "validate_inputs"):
            taken = inspect.getfullargspec(node.validate_inputs)
            own = [socket.id for socket in sockets] if taken.varkw else taken.args
        for socket in sockets:
            value = inputs.get(socket.id)
            if value is None or socket.id in own:
                continue
            low, high = socket.options.get("min", -1e300), socket.options.get("max", 1e300)
            if socket.kind in ("INT", "FLOAT") and not low <= value <= high:
                return f"{socket.id}: {value} is not in [{low}, {high}]"
            if socket.kind == "COMBO" and value not in socket.options["options"]:
                return f"{socket.id}: '{value}' not in list"
        found = node.validate_inputs(**{name: value for name, value in inputs.items() if name in own}) if own else True
        assert found is True or isinstance(found, str)
        return found

    def run(self, node_id: str, **inputs: Any) -> Any:
        """What the node gives, with the defaults of the schema where nothing is said."""
        node = self.nodes[node_id]
        every = node.define_schema().inputs
        assert set(inputs) <= {socket.id for socket in every}, inputs
        given = {s.id: s.options["default"] for s in every if s.is_widget} | inputs
        with torch.inference_mode():
            (result,) = node.execute(**given).args
        return result

    def queue(self, prompt: dict[str, dict[str, Any]], outside: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """Validate and run a workflow in the form of the API; what each node gives, slot by slot. `outside`: what nodes of
        ComfyUI itself give; one that is not named gives what it takes."""
        for node in prompt.values():
            inputs = {name: None if isinstance(value, list) else value for name, value in node["inputs"].items()}
            if node["class_type"] in self.nodes and (found := self.validate(node["class_type"], **inputs)) is not True:
                raise ValueError(found)
        results: dict[str, tuple[Any, ...]] = {}

        def result(key: str) -> tuple[Any, ...]:
            if key not in results:
                kind, inputs = prompt[key]["class_type"], prompt[key]["inputs"]
                known = {name: result(v[0])[v[1]] if isinstance(v, list) else v for name, v in inputs.items()}
                ours = kind in self.nodes
                results[key] = (self.run(kind, **known),) if ours else outside.get(kind, tuple(known.values()))
            return results[key]

        return {key: result(key) for key in prompt}


class ProgressBar:
    """Sends what it is told to the host."""

    host: Host

    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.host.updates.append((value, total or self.total, preview))


def install(monkeypatch: Any, models_dir: Path) -> Host:
    """The modules of ComfyUI that a node imports, for as long as `monkeypatch` lasts."""
    host = Host(models_dir)
    io = SimpleNamespace(Custom=custom, Schema=Schema, NodeOutput=NodeOutput, ComfyNode=ComfyNode)
    for name, kind in {"Image": "IMAGE", "Mask": "MASK", **WIDGETS}.items():
        setattr(io, name, custom(kind))
    management = {
        "get_torch_device": lambda: torch.device("cpu"),
        "throw_exception_if_processing_interrupted": host.interrupted,
        "free_memory": lambda size, device: setattr(host, "room", size),
    }
    contents: dict[str, dict[str, Any]] = {
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": io},
        "comfy": {},
        "comfy.utils": {"ProgressBar": type("ProgressBar", (ProgressBar,), {"host": host})},
        "comfy.model_management": management,
        "folder_paths": {
            "models_dir": str(models_dir),
            "add_model_folder_path": lambda kind, path: host.places.setdefault(kind, []).append(path),
            "get_folder_paths": lambda kind: host.places[kind],
        },
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    return host
