"""The folder of a refinement model: `refine.json` and `refine.safetensors` beside what every model has, and for models of prompts
the text encoder under `text_encoder/`."""

from typing import Any

from bitdance.folder.picture_model import Layout
from bitdance.kinds.refine.config import RefineConfig
from bitdance.kinds.refine.model import build_network
from bitdance.kinds.refine.settings import choose

LAYOUT: Layout[Any] = Layout("refine", RefineConfig.from_dict, build_network, choose)
