"""Model folders from one layout into another, tensor by tensor: no model is ever held whole.

stored.py       tensors of safetensors files, read piece by piece, and files written the same way
source.py       what a model folder holds, as `Source`: its small files and its tensors by part
conversion.py   a `Source` → a new folder, whole or not at all
diffusers.py    the layout of a diffusers pipeline: its names, its configs, and a view of it as the published one
"""

from bitdance.formats.conversion import FORMATS, convert
from bitdance.formats.source import KEY_MAP_VERSION, Source

__all__ = ["FORMATS", "KEY_MAP_VERSION", "Source", "convert"]
