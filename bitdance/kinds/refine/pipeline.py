"""What users hold of a refinement model: prompts or classes in, pictures out; and pictures changed.

from bitdance import load_pipeline
pipe = load_pipeline("folder")
pipe("a red apple", seed=1).images[0].save("apple.png")      # or pipe(class_label="ship")
pipe.edit(picture, "a green apple", mask=mask).images[0]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitdance.coding import check_form, generators_for
from bitdance.kinds.refine.edit import Edit, read_edit
from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.labels import bits_of, labels_of
from bitdance.kinds.refine.loop import OnStep, OwnDraws, Start, refine
from bitdance.kinds.refine.predictors import ClassPredictor, TextPredictor
from bitdance.kinds.refine.settings import NAMES, RefineSettings, choose
from bitdance.picture_pipeline import OUTPUT_TYPES, OutputType, PictureOutput, PicturePipeline
from bitdance.values import check_number

Callback = Callable[["RefinePipeline", int, float, dict[str, Any]], Any]


class RefinePipeline(PicturePipeline):
    """Class or prompt → picture by refinement. `.model` holds the parts, `.names` are the classes of a model that has any."""

    layout = LAYOUT

    def predictor(self, conditions: Sequence[Any], negative: Sequence[str] | None = None) -> ClassPredictor | TextPredictor:
        """The network with the conditions of a batch: class numbers, or prompts and what stands against each (default: "")."""
        if not self.of_prompts:
            return ClassPredictor(self.model.network, conditions)
        assert self.model.text is not None
        against = [""] * len(conditions) if negative is None else list(negative)
        return TextPredictor(self.model.network, self.model.text.encode(conditions), self.model.text.encode(against))

    @torch.no_grad()
    def generate(
        self,
        conditions: Sequence[Any],
        height: int,
        width: int,
        settings: RefineSettings,
        generators: Sequence[torch.Generator],
        on_block: OnStep | None = None,
        start: Start | None = None,
        spent: list[int] | None = None,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        """One picture per condition → bits (B,C,h,w) in {-1,+1}: what a call does once all is checked, for callers that have
        checked it. `start`: labels to go on from."""
        self._cancelled.clear()
        config, s = self.model.network.config, self.model.tokenizer.downsampling
        predictor = self.predictor(conditions, negative)
        draws = OwnDraws(generators, config, (height // s, width // s), predictor.by_token)

        def on_step(done: int, total: int, labels_BGhw: Tensor) -> None:
            if on_block is not None:
                on_block(done, total, bits_of(labels_BGhw, config))

        labels = refine(predictor, settings, draws, len(conditions), on_step, self._cancelled, start, spent)
        return bits_of(labels, config)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        preset: str | None = None,
        class_label: int | str | Sequence[int | str] | None = None,
        negative_prompt: str | None = None,
        **said: Any,
    ) -> PictureOutput:
        """Make `num_images_per_prompt` pictures per prompt or class, all in one batch, the pictures of one together.

        prompt, class_label   which of the two, the model decides
        height, width         pixels; a class model makes one size, a model of prompts any multiple of its downsampling
        num_inference_steps   steps of the whole picture (published: 50), with adaptive steps the most
        guidance_scale        published as cfg; <= 1 leaves guidance out
        seed, generator       one per picture, as in `BitDancePipeline`
        output_type           "pil", "np" (B,H,W,3), "pt" (B,3,H,W), or "tokens" (no decoding; also called "bits")
        callback_on_step_end  called as (pipe, step, t, {"tokens": …}) after each step with the bits predicted so far; t is the
                              finished share in (0, 1]. `pipe.cancel(i)` in it ends picture i. An exception ends the run.
        preset                "fixed", "adaptive" (as many steps as a picture needs), or a published model's: "GRN-B", …
        negative_prompt       of a model of prompts: what stands against the prompt (default: nothing)
        tau, guidance_interval, guidance_power, schedule, adaptive, ramp_steps, share_cap, share_shift, end_share
                              see `settings.RefineSettings`

        A picture depends on its condition, seed and settings, not on its neighbours in the batch. With one picture, float32 and
        CPU, the labels are those of the published code for the same seed. All arguments are checked before any work; ValueError
        says what is allowed. `steps` of the output says how many each picture took.
        """
        conditions = self._conditions(prompt, class_label, check_number("num_images_per_prompt", num_images_per_prompt))
        height, width = self._size(height, width)
        settings = self.settings(preset, num_inference_steps, guidance_scale, **said)
        negative = self._negative(negative_prompt, len(conditions))
        check_form(output_type, OUTPUT_TYPES, callback_on_step_end)
        generators, seeds = generators_for(len(conditions), seed, generator)
        return self._run(conditions, height, width, settings, generators, seeds, output_type, callback_on_step_end, negative)

    def edit(
        self,
        image: Any,
        prompt: str | None = None,
        class_label: int | str | None = None,
        mask: Any = None,
        strength: float | None = None,
        extend: tuple[int, int, int, int] | None = None,
        source_prompt: str | None = None,
        source_class: int | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        preset: str | None = None,
        negative_prompt: str | None = None,
        **said: Any,
    ) -> PictureOutput:
        """Change a picture: `num_images` variants, each with a seed of its own.

        image           a PIL picture or bits (1,C,h,w) or (C,h,w) in {-1,+1}; bits outside of what is drawn anew stay equal
        mask            what is drawn anew: a PIL picture of the same size (white: anew), or a bool tensor (h,w) of tokens;
                        a token is drawn anew where any of its pixels is
        strength        share of the steps that are taken, in (0, 1]: at 1 (default with a mask) nothing of what is drawn anew
                        is kept, at less the picture's own labels are where it starts
        extend          new ground at the top, right, bottom and left, in pixels: the picture grows, its own tokens stay (models
                        of prompts)
        source_prompt, source_class   what the picture shows now. Without a mask this finds what must change: the labels that
                        the model would not give the picture under the new condition, but under this one. Without either all
                        may change, and strength (then 0.7 by default) says how far.

        The other arguments are those of a call. ValueError says what is allowed.
        """
        conditions = self._conditions(prompt, class_label, 1)
        source = None
        if source_prompt is not None or source_class is not None:
            source = self._conditions(source_prompt, source_class, 1)[0]
        settings = self.settings(preset, num_inference_steps, guidance_scale, **said)
        check_form(output_type, OUTPUT_TYPES, callback_on_step_end)
        count = check_number("num_images_per_prompt", num_images)
        found = read_edit(self, image, mask, strength, conditions[0], source, extend)
        generators, seeds = generators_for(count, seed, generator)
        height, width = found.size
        negative = self._negative(negative_prompt, count)
        start = self._start(found, count)
        every = conditions * count
        return self._run(every, height, width, settings, generators, seeds, output_type, callback_on_step_end, negative, start)

    def _start(self, found: Edit, count: int) -> Start:
        labels_BGhw = labels_of(found.bits_Chw[None], self.model.network.config).expand(count, -1, -1, -1)
        return Start(labels_BGhw, found.fixed_hw[None].expand(count, -1, -1), found.strength)

    def _run(
        self,
        conditions: Sequence[Any],
        height: int,
        width: int,
        settings: RefineSettings,
        generators: Sequence[torch.Generator],
        seeds: list[int | None],
        output_type: str,
        callback: Callback | None,
        negative: Sequence[str] | None,
        start: Start | None = None,
    ) -> PictureOutput:
        spent: list[int] = []
        with self._bar("steps", settings.steps) as bar:

            def on_step(done: int, total: int, bits_BChw: Tensor) -> None:
                bar.total = total
                bar.update()
                if callback is not None:
                    callback(self, done - 1, done / total, {"tokens": bits_BChw})

            bits_BChw = self.generate(conditions, height, width, settings, generators, on_step, start, spent, negative)
        classes = None if self.of_prompts else list(conditions)
        return self._output(bits_BChw, generators, output_type, seeds, classes=classes, steps=spent)

    def settings(
        self,
        preset: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        **said: Any,
    ) -> RefineSettings:
        """The settings that a call with these arguments has. ValueError says what is allowed."""
        numbers = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        steps, guidance = (None if value is None else check_number(name, value) for name, value in numbers.items())
        if unknown := sorted(set(said) - set(NAMES)):
            raise TypeError(f"unknown arguments {', '.join(unknown)}; settings are {', '.join(NAMES)}")
        return choose(self.model.defaults, preset, steps=steps, guidance=guidance, **said)
