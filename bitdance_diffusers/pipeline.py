"""`BitDanceDiffusionPipeline`: prompts → pictures by the loop of `bitdance.generate`, in the manners of diffusers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdance.model import BitDanceModel
from bitdance.networks.backbone import exact_frequencies
from bitdance.pipeline import BitDancePipeline
from bitdance_diffusers.backbone import HookedBackbone
from bitdance_diffusers.modeling_autoencoder import BitDanceAutoencoder
from bitdance_diffusers.modeling_diffusion_head import BitDanceDiffusionHead
from bitdance_diffusers.modeling_projector import BitDanceProjector

__all__ = ["BitDanceDiffusionPipeline", "BitDancePipelineOutput"]
OUTPUT_TYPES = ("pil", "np", "pt", "bits", "latent")
CALLBACK_INPUTS = ("bits",)
PARTS = ("tokenizer", "text_encoder", "autoencoder", "diffusion_head", "projector")


@dataclass
class BitDancePipelineOutput(BaseOutput):
    """`images`: list of PIL pictures, array (B,H,W,3) or tensor (B,3,H,W) in [0,1]; the bits for "bits" and "latent".
    `bits` (B,C,h,w) in {-1,+1}. `seeds`: None where a generator was passed."""

    images: list[Image.Image] | np.ndarray | Tensor
    bits: Tensor
    seeds: list[int | None]


class BitDanceDiffusionPipeline(DiffusionPipeline):
    """Text → picture. `settings` are what `bitdance.json` says of `defaults` and `sizes`."""

    # Head and projector work between calls of the text encoder: they come once, and nothing leaves for them.
    model_cpu_offload_seq = "text_encoder->autoencoder"

    def __init__(
        self,
        autoencoder: BitDanceAutoencoder,
        diffusion_head: BitDanceDiffusionHead,
        projector: BitDanceProjector,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            autoencoder=autoencoder,
            diffusion_head=diffusion_head,
            projector=projector,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(settings=settings)
        self._made: tuple[list[Any], _Runner] | None = None

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As of every pipeline. This class is the one that the folder means, so its pipeline.py is not needed."""
        found = super().load_config(*args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return found

    def to(self, *args: Any, **kwargs: Any) -> "BitDanceDiffusionPipeline":
        """As of every pipeline; the frequencies of the rotary positions stay float32, on which far positions depend."""
        with exact_frequencies(self.text_encoder):
            super().to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["BitDanceDiffusionPipeline", int, float, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_INPUTS,
        **sampling: Any,
    ) -> BitDancePipelineOutput | tuple[Any, ...]:
        """Pictures as `bitdance.BitDancePipeline` makes them, bit for bit, with the same arguments and errors.

        `generator` is one per picture, or a single one. `output_type`: "pil", "np", "pt", or "bits" = "latent" for no
        decoding. `sampling`: `seed` in place of generators, `sampler`, `preset`, `guidance_interval`, `last_steps`.
        `callback_on_step_end(pipe, block, t, {"bits": …})` comes after each block. A step is one of the solver, of
        which every block takes `num_inference_steps`; the progress bar counts blocks.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type = {output_type!r}; allowed are {', '.join(OUTPUT_TYPES)}")
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(CALLBACK_INPUTS)):
            raise ValueError(f"callback_on_step_end_tensor_inputs names {unknown}; there is {', '.join(CALLBACK_INPUTS)}")

        def after_block(_: BitDancePipeline, block: int, t: float, values: dict[str, Any]) -> None:
            assert callback_on_step_end is not None
            callback_on_step_end(self, block, t, {name: values[name] for name in callback_on_step_end_tensor_inputs})

        no_pictures = output_type in ("bits", "latent")
        try:
            result = self._runner()(
                prompt,
                height,
                width,
                num_inference_steps,
                guidance_scale,
                num_images_per_prompt,
                generator=generator,
                output_type="bits" if no_pictures else output_type,  # type: ignore[arg-type]
                callback_on_step_end=None if callback_on_step_end is None else after_block,
                **sampling,
            )
        finally:
            self.maybe_free_model_hooks()
        images = result.bits if no_pictures else result.images
        assert images is not None
        return BitDancePipelineOutput(images, result.bits, result.seeds) if return_dict else (images,)

    def _runner(self) -> "_Runner":
        """Made of the components there are now; anew when one has been replaced."""
        parts = [getattr(self, name) for name in PARTS]
        if self._made is None or any(a is not b for a, b in zip(self._made[0], parts, strict=True)):
            self._made = parts, _Runner(self)
        return self._made[1]


class _Runner(BitDancePipeline):
    """The pipeline of `bitdance`, which checks, draws and loops, over the components of `host`, called through their hooks."""

    def __init__(self, host: BitDanceDiffusionPipeline) -> None:
        backbone = HookedBackbone(host.text_encoder, lambda: host._execution_device)
        autoencoder, head = host.autoencoder.inner, host.diffusion_head.inner
        model = BitDanceModel(autoencoder, host.tokenizer, host.projector, backbone, head)
        model.extras = dict(host.config.settings or {})
        super().__init__(model, compile=False)
        self._host, self._block_sampler = host, host.diffusion_head

    def _bar(self, total: int) -> tqdm:
        return self._host.progress_bar(total=total)

    def _decode_one(self, bits_1Chw: Tensor, generator: torch.Generator, strips: bool | None) -> Tensor:
        autoencoder = self._host.autoencoder
        if next(autoencoder.parameters()).is_meta:
            strips = False  # weights that come layer by layer are not there for strips
        return autoencoder(bits_1Chw, generator, strips)
