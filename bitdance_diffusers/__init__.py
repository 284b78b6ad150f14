"""BitDance as a pipeline of diffusers: the classes that a folder of `bitdance export --format diffusers` names.

    from bitdance_diffusers import BitDanceDiffusionPipeline
    pipe = BitDanceDiffusionPipeline.from_pretrained(FOLDER)

Needs the extra: pip install 'bitdance[diffusers]'. The components hold the modules of `bitdance` and `lfq_tokenizer`, with the
tensor names of the published files; what is computed is computed there.
"""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as _error:
    raise ImportError("bitdance_diffusers needs diffusers: pip install 'bitdance[diffusers]'") from _error

from bitdance_diffusers.modeling_autoencoder import BitDanceAutoencoder
from bitdance_diffusers.modeling_diffusion_head import BitDanceDiffusionHead
from bitdance_diffusers.modeling_projector import BitDanceProjector
from bitdance_diffusers.pipeline import BitDanceDiffusionPipeline, BitDancePipelineOutput

__all__ = [
    "BitDanceAutoencoder",
    "BitDanceDiffusionHead",
    "BitDanceDiffusionPipeline",
    "BitDancePipelineOutput",
    "BitDanceProjector",
]
