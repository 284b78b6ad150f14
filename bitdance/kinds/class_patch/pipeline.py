"""What users hold of a class-conditional model: classes in, pictures out.

from bitdance import load_pipeline
pipe = load_pipeline("folder")
pipe(class_label="golden retriever", seed=1).images[0].save("dog.png")
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitdance.coding import check_form, generators_for
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.kinds.class_patch.generate import OnBlock, generate_bits, sampler_of
from bitdance.kinds.class_patch.settings import ClassSettings, choose
from bitdance.picture_pipeline import OUTPUT_TYPES, OutputType, PictureOutput, PicturePipeline
from bitdance.values import check_number

Callback = Callable[["ClassPipeline", int, float, dict[str, Any]], Any]


class ClassPipeline(PicturePipeline):
    """Class → picture. `.model` holds the parts, `.names` are the classes."""

    layout = LAYOUT

    def __init__(self, model: PictureModel) -> None:
        super().__init__(model)
        self._block_sampler = sampler_of(model.network)

    def generate(
        self,
        classes: Sequence[int],
        height: int,
        width: int,
        settings: ClassSettings,
        generators: Sequence[torch.Generator],
        on_block: OnBlock | None = None,
    ) -> Tensor:
        """One picture per class → bits (B,C,h,w) in {-1,+1}: what a call does once all is checked, for callers that have
        checked it. Height and width are the model's."""
        self._cancelled.clear()
        return generate_bits(
            self.model.network,
            classes,
            settings,
            generators,
            on_block,
            block_sampler=self._block_sampler,
            cancelled=self._cancelled,
        )

    def __call__(
        self,
        class_label: int | str | Sequence[int | str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_class: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        sampler: str | None = None,
        preset: str | None = None,
        cfg_schedule: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        last_steps: int | None = None,
        prompt: None = None,
    ) -> PictureOutput:
        """Make `num_images_per_class` pictures per class, all in one batch, the pictures of a class together.

        class_label           a class's number, one of its names or its WordNet id, or a list of them; `pipe.names` knows them
        height, width         pixels; a class model makes one size, `pipe.model.sizes[0]`
        num_inference_steps   solver steps per *block*; published: 100
        guidance_scale        published as cfg_scale: default what the model's folder says, else 4.6; <= 1 leaves guidance out
        cfg_schedule          "linear" (published): guidance rises from 1 at the first block; "constant": the same everywhere
        seed, generator       one per picture, as in `BitDancePipeline`
        output_type           "pil", "np" (B,H,W,3), "pt" (B,3,H,W), or "tokens" (no decoding; also called "bits")
        callback_on_step_end  called as (pipe, block, t, {"tokens": …}) after each block; t is the finished share in (0, 1],
                              unfinished bits are 0. `pipe.cancel(i)` in it ends picture i. An exception ends the run.
        preset                a published model's steps and guidance: "B-1x", …; what is said beside it wins
        sampler, guidance_interval, last_steps   as in `BitDancePipeline`

        A picture depends on its class, seed and settings, not on its neighbours in the batch. With one picture, float32 and CPU,
        the bits are those of the published code for the same seed. All arguments are checked before any work; ValueError says
        what is allowed.
        """
        classes = self._classes(class_label, prompt, check_number("num_images_per_prompt", num_images_per_class))
        self._check_only_size(height, width)
        numbers = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        said = {name: None if value is None else check_number(name, value) for name, value in numbers.items()}
        settings = choose(
            self.model.defaults,
            preset,
            cfg_schedule,
            steps=said["num_inference_steps"],
            guidance=said["guidance_scale"],
            sampler=sampler,
            guidance_interval=guidance_interval,
            last_steps=last_steps,
        )
        check_form(output_type, OUTPUT_TYPES, callback_on_step_end)
        generators, seeds = generators_for(len(classes), seed, generator)

        with self._bar("blocks", self.model.network.config.num_blocks) as bar:

            def on_block(done: int, total: int, bits_BChw: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, done - 1, done / total, {"tokens": bits_BChw})

            bits_BChw = self.generate(classes, *self.model.sizes[0], settings, generators, on_block)
        return self._output(bits_BChw, generators, output_type, seeds, classes=classes)
