"""The folder of a next-scale model: `next_scale.json` and `next_scale.safetensors` beside what every model has, and for models of
prompts the text encoder under `text_encoder/`."""

from bitdance.folder.picture_model import Layout
from bitdance.kinds.next_scale.config import NextScaleConfig
from bitdance.kinds.next_scale.network import NextScaleNetwork
from bitdance.kinds.next_scale.settings import choose

LAYOUT = Layout("next_scale", NextScaleConfig.from_dict, NextScaleNetwork, choose)
