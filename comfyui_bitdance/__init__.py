"""Nodes of ComfyUI for every kind of model that the package `bitdance` knows: load, encode, generate, decode, edit.

ComfyUI finds them in a copy of this folder, or a link to it, in its `custom_nodes` (docs/comfyui). It loads the folder under a
name of its own, so files in here import each other relatively. Nothing of ComfyUI is imported before it asks for the nodes.
"""

from importlib import import_module
from typing import Any

WEB_DIRECTORY = "./web"  # web/docs/NODE.md is the help of a node
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

NEEDS = {
    "comfy_api.latest": "these nodes work inside ComfyUI (0.3.64 or newer): put comfyui_bitdance into its custom_nodes",
    "bitdance": "these nodes need the package bitdance in ComfyUI's own Python: python -m pip install FOLDER-OF-THE-PROJECT",
}


async def comfy_entrypoint() -> Any:
    """The extension, as ComfyUI asks for it. ImportError outside of ComfyUI, or without the library, says what to do."""
    for name, words in NEEDS.items():
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f"{words} (docs/comfyui)") from error
    from .nodes import BitDanceExtension

    return BitDanceExtension()
