"""BitDance: autoregressive text-to-image over binary tokens. Names are imported when they are first used."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# transformers imports torchao where that is installed, and it warns of kernels that this machine cannot load; errors are shown.
for _talkative in map(logging.getLogger, ("torchao", "torch.utils._pytree")):
    if _talkative.level == logging.NOTSET:
        _talkative.setLevel(logging.ERROR)

# Where each public name lives. `import bitdance` loads none of these files, so that `bitdance --help` stays fast.
_HOME = {
    "Backbone": "backbone",
    "BinaryDiffusionHead": "head",
    "BitDanceModel": "model",
    "BitDanceOutput": "pipeline",
    "BitDancePipeline": "pipeline",
    "HeadConfig": "head",
    "ImagePiece": "sequence",
    "PatchPlan": "patches",
    "Projector": "projector",
    "SpecialTokens": "prompt",
    "TextPiece": "sequence",
    "TrainingBatch": "sequence",
    "TrainingLosses": "model",
    "build_batch": "sequence",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from bitdance.backbone import Backbone as Backbone
    from bitdance.checkpoint import load_model as load_model
    from bitdance.checkpoint import save_model as save_model
    from bitdance.head import BinaryDiffusionHead as BinaryDiffusionHead
    from bitdance.head import HeadConfig as HeadConfig
    from bitdance.model import BitDanceModel as BitDanceModel
    from bitdance.model import TrainingLosses as TrainingLosses
    from bitdance.patches import PatchPlan as PatchPlan
    from bitdance.pipeline import BitDanceOutput as BitDanceOutput
    from bitdance.pipeline import BitDancePipeline as BitDancePipeline
    from bitdance.projector import Projector as Projector
    from bitdance.prompt import SpecialTokens as SpecialTokens
    from bitdance.sequence import ImagePiece as ImagePiece
    from bitdance.sequence import TextPiece as TextPiece
    from bitdance.sequence import TrainingBatch as TrainingBatch
    from bitdance.sequence import build_batch as build_batch


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitdance' has no attribute {name!r}")
    value = getattr(import_module(f"bitdance.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
