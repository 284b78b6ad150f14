"""Small models of every kind in `models/bitdance`, and ComfyUI's stand-in with our nodes, for the tests of the nodes."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import comfy_stub
import pytest
import refine_model
from class_model import golden_model, golden_tokenizer
from golden_cases import GOLDEN
from scale_cases import var_network, var_tokenizer

import comfyui_bitdance
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.class_patch.folder import LAYOUT as CLASS_PATCH
from bitdance.kinds.next_scale.folder import LAYOUT as NEXT_SCALE
from bitdance.sequence.classes import ClassEntry, ClassNames

NAMES = ClassNames(tuple(ClassEntry((name,)) for name in ("tench", "crane", "red fox", *(f"thing {i}" for i in range(7)))))
QUICK: dict[str, Any] = {"steps": 2, "guidance": 1.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name → what it shows, and how it is asked for
    "text": ("a red cube", {"width": 32, "height": 32, **QUICK}),
    "classes": ("red fox", QUICK),
    "refine": ("bee", {"steps": 5}),
    "refine_text": ("a red cube", {"steps": 5}),
    "scales": ("1", {}),
}


def small_models(home: Path) -> Path:
    """The folder `models` of a ComfyUI that has them."""
    place = home / "bitdance"
    place.mkdir(parents=True)
    (place / "text").symlink_to(GOLDEN / "t2i_ckpt")
    classes = PictureModel(golden_model(16), golden_tokenizer(), NAMES, {"defaults": {"guidance_scale": 2.0}})
    CLASS_PATCH.save(classes, place / "classes")
    refine_model.saved(refine_model.class_model(), place / "refine")
    refine_model.saved(refine_model.text_model(), place / "refine_text")
    NEXT_SCALE.save(PictureModel(var_network("var"), var_tokenizer(), None, {}), place / "scales")
    return home


def started(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> comfy_stub.Host:
    """ComfyUI with our nodes, which are imported anew for it."""
    for name in [name for name in sys.modules if name.startswith("comfyui_bitdance.")]:
        monkeypatch.delitem(sys.modules, name)
    host = comfy_stub.install(monkeypatch, models_dir)
    extension = asyncio.run(comfyui_bitdance.comfy_entrypoint())
    asyncio.run(extension.on_load())
    nodes = asyncio.run(extension.get_node_list())
    host.nodes = {node.define_schema().node_id: node for node in nodes}
    return host


_LOADED: dict[tuple[Path, str], Any] = {}


def loaded(host: comfy_stub.Host, name: str) -> Any:
    """The model by the node, once for all tests."""
    key = host.models_dir, name
    if key not in _LOADED:
        _LOADED[key] = host.run("BitDanceLoadModel", model=name)
        _LOADED[key].set_progress_bar_config(disable=True)
    return _LOADED[key]
