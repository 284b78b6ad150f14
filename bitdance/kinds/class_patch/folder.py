"""The folder of a class-conditional model: `class_patch.json` and `class_patch.safetensors` beside what every model has."""

from bitdance.folder.picture_model import Layout
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.model import ClassPatchModel
from bitdance.kinds.class_patch.settings import choose

LAYOUT = Layout("class_patch", ClassPatchConfig.from_dict, ClassPatchModel, choose)
