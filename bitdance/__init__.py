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
    "Backbone": "networks.backbone",
    "BinaryDiffusionHead": "heads.diffusion.network",
    "BitDanceModel": "model",
    "BitDanceOutput": "pipeline",
    "BitDancePipeline": "pipeline",
    "HeadConfig": "heads.diffusion.network",
    "ImagePiece": "sequence.batch",
    "PatchPlan": "sequence.patches",
    "Projector": "networks.projector",
    "SpecialTokens": "sequence.prompt",
    "TextPiece": "sequence.batch",
    "TrainingBatch": "sequence.batch",
    "TrainingLosses": "model",
    "build_batch": "sequence.batch",
    "load_model": "folder.checkpoint",
    "load_pipeline": "generator",
    "save_model": "folder.checkpoint",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from bitdance.folder.checkpoint import load_model as load_model
    from bitdance.folder.checkpoint import save_model as save_model
    from bitdance.generator import load_pipeline as load_pipeline
    from bitdance.heads.diffusion.network import BinaryDiffusionHead as BinaryDiffusionHead
    from bitdance.heads.diffusion.network import HeadConfig as HeadConfig
    from bitdance.model import BitDanceModel as BitDanceModel
    from bitdance.model import TrainingLosses as TrainingLosses
    from bitdance.networks.backbone import Backbone as Backbone
    from bitdance.networks.projector import Projector as Projector
    from bitdance.pipeline import BitDanceOutput as BitDanceOutput
    from bitdance.pipeline import BitDancePipeline as BitDancePipeline
    from bitdance.sequence.batch import ImagePiece as ImagePiece
    from bitdance.sequence.batch import TextPiece as TextPiece
    from bitdance.sequence.batch import TrainingBatch as TrainingBatch
    from bitdance.sequence.batch import build_batch as build_batch
    from bitdance.sequence.patches import PatchPlan as PatchPlan
    from bitdance.sequence.prompt import SpecialTokens as SpecialTokens


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitdance' has no attribute {name!r}")
    value = getattr(import_module(f"bitdance.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
