"""Nodes of ComfyUI for every kind of model that the package `bitdance` knows: load, encode, generate, decode, edit.

ComfyUI finds them in a copy of this folder, or a link to it, in its `custom_nodes` (docs/comfyui). It loads the folder under a
name of its own, so files in here import each other relatively. Nothing of ComfyUI is imported before it asks for the nodes.
"""

from typing import Any

WEB_DIRECTORY = "./web"  # web/docs/NODE.md is the help of a node
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """The extension, as ComfyUI asks for it. ImportError outside of ComfyUI."""
    from .nodes import BitDanceExtension

    return BitDanceExtension()
