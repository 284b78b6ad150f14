"""What users hold of a next-scale model: prompts or classes in, pictures out, coarse to fine.

from bitdance import load_pipeline
pipe = load_pipeline("folder")
pipe(class_label="golden retriever", seed=1).images[0].save("dog.png")      # or pipe("a red apple")
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bitdance.coding import FORMS, Images, as_unit, check_form, generators_for
from bitdance.folder.picture_model import PictureModel
from bitdance.kinds.next_scale.folder import LAYOUT
from bitdance.kinds.next_scale.generate import Given, ScaleCanvas, condition_of, generate_tokens, own_draws
from bitdance.kinds.next_scale.graphs import ScaleGraphs
from bitdance.kinds.next_scale.schedule import schedule_of
from bitdance.kinds.next_scale.settings import NAMES, NextScaleSettings, choose
from bitdance.loop import OnBlock
from bitdance.picture_pipeline import OUTPUT_TYPES, OutputType, PictureOutput, PicturePipeline
from bitdance.values import check_number, shown
from lfq_tokenizer.scales import Side

Callback = Callable[["NextScalePipeline", int, float, dict[str, Any]], Any]


class NextScalePipeline(PicturePipeline):
    """Class or prompt → picture, scale after scale. `.model` holds the parts, `.names` are the classes of a model that has
    any."""

    layout = LAYOUT

    def __init__(self, model: PictureModel) -> None:
        super().__init__(model)
        self._graphs = ScaleGraphs(model.network)

    def sides(self, height: int, width: int) -> list[Side]:
        """The scales of a picture of this size, in pixels. ValueError for one that has no schedule, with the nearest that do."""
        config, s = self.model.network.config, self.model.tokenizer.downsampling
        side = (height // s, width // s)
        if side == config.sides[-1] and height % s == 0 and width % s == 0:
            return list(config.sides)
        if not config.rotary or height % s or width % s:
            only = "×".join(str(s * n) for n in config.sides[-1])
            raise ValueError(f"height {height} × width {width} is not supported: this model makes pictures of {only} pixels only")
        return list(schedule_of(side))

    @torch.no_grad()
    def canvas(
        self,
        conditions: Sequence[Any],
        height: int,
        width: int,
        settings: NextScaleSettings,
        generators: Sequence[torch.Generator],
        on_block: OnBlock | None = None,
        given: Given | None = None,
        negative: Sequence[str] | None = None,
    ) -> ScaleCanvas:
        """One picture per condition, from which tokens and pictures are told."""
        self._cancelled.clear()
        condition = condition_of(self.model.network, self.model.text, conditions, settings.guided, negative)
        network, quantizer, sides = self.model.network, self.model.tokenizer.quantize, self.sides(height, width)
        draws, graphs = own_draws(generators), self._graphs if self.device.type == "cuda" else None
        return generate_tokens(
            network, quantizer, condition, sides, settings, draws, len(conditions), on_block, self._cancelled, given, graphs
        )

    def generate(
        self,
        conditions: Sequence[Any],
        height: int,
        width: int,
        settings: NextScaleSettings,
        generators: Sequence[torch.Generator],
        on_block: OnBlock | None = None,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        """One picture per condition → what the decoder reads (B,Z,h,w): what a call does once all is checked."""
        return self.canvas(conditions, height, width, settings, generators, on_block, negative=negative).total

    @torch.no_grad()
    def encode(self, images: Any) -> list[Tensor]:
        """Pictures → tokens of every scale: indices (B,h,w), or bits (B,T,h,w) in {-1,+1}. `images` as of other pipelines."""
        if getattr(self.model.tokenizer, "encoder", None) is None:
            raise ValueError("the model was loaded without its picture encoder; load it with generation_only=False")
        unit_B3HW = as_unit(images).to(self.device, self.dtype)
        return self.model.tokenizer.encode(2 * unit_B3HW - 1, self.sides(*unit_B3HW.shape[2:]))

    def decode(self, tokens: Any, generators: Any = None, output_type: str = "pil") -> Images:
        """Tokens of every scale → pictures, as `images` of an output: "pil", "np" or "pt"."""
        check_form(output_type, FORMS)
        if not isinstance(tokens, list | tuple) or not all(isinstance(one, Tensor) for one in tokens) or not tokens:
            raise ValueError(f"tokens are {shown(type(tokens).__name__)}; give the list of every scale's tokens")
        sides = [(one.shape[-2], one.shape[-1]) for one in tokens]
        with torch.no_grad():
            total = self.model.tokenizer.quantize.sums([one.to(self.device) for one in tokens], sides)[-1]
        return self._formed(self.decode_tensor(total, ()), output_type)

    @torch.no_grad()
    def decode_unchecked(self, total_BZhw: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """What `generate` gave → decoder output (B,3,H,W), one picture at a time."""
        return torch.cat([self.model.tokenizer.decode_sum(one[None].to(self.device)) for one in total_BZhw]).float()

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        height, width         pixels; a class model makes one size, a model of prompts those of the published schedules
        guidance_scale        published as cfg; 0 (VAR) or 1 (Infinity) leaves guidance out
        seed, generator       one per picture, as in `BitDancePipeline`
        output_type           "pil", "np" (B,H,W,3), "pt" (B,3,H,W), or "tokens" (no decoding)
        callback_on_step_end  called as (pipe, scale, t, {"tokens": …}) after each scale with the tokens so far; t is the
                              finished share in (0, 1]. `pipe.cancel(i)` in it ends picture i. An exception ends the run.
        preset                "own", "plain", or a published model's: "VAR", "VAR-demo", "Infinity-2B", "Infinity-8B"
        tau, top_k, top_p, more_smooth, cfg_schedule, guidance_by_scale, tau_by_scale, insertion
                              see `settings.NextScaleSettings`

        A picture depends on its condition, seed and settings, not on its neighbours in the batch. With one picture, float32 and
        CPU, the tokens are those of the published code for the same seed. All arguments are checked before any work; ValueError
        says what is allowed. `tokens` of the output are a list, one entry per scale.
        """
        conditions = self._conditions(prompt, class_label, check_number("num_images_per_prompt", num_images_per_prompt))
        height, width = self._size(height, width)
        settings = self.settings(preset, guidance_scale, **said)
        negative = self._negative(negative_prompt, len(conditions))
        check_form(output_type, OUTPUT_TYPES, callback_on_step_end)
        generators, seeds = generators_for(len(conditions), seed, generator)
        return self._run(
            conditions, height, width, settings, generators, seeds, output_type, callback_on_step_end, None, negative
        )

    def edit(
        self,
        image: Any,
        prompt: str | None = None,
        class_label: int | str | None = None,
        mask: Any = None,
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
        """Change a picture where a mask is white: `num_images` variants, each with a seed of its own.

        The tokens of all scales are predicted, and those of what stays are replaced by the picture's own, the first scale always;
        so what stays is only reconstructed, and is context for the rest. Source: VAR paper (arXiv 2404.02905), zero-shot editing.

        image   a PIL picture of a size that the model makes, or the tokens of one picture
        mask    a PIL picture of the same size, white where something is drawn anew, or a bool tensor (h,w) of the last scale

        The other arguments are those of a call. ValueError says what is allowed.
        """
        conditions = self._conditions(prompt, class_label, 1)
        if mask is None:
            raise ValueError("an edit of this kind of model needs a mask: white where something is drawn anew")
        settings = self.settings(preset, guidance_scale, **said)
        check_form(output_type, OUTPUT_TYPES, callback_on_step_end)
        count = check_number("num_images_per_prompt", num_images)
        tokens = self.encode(image) if isinstance(image, Image.Image) else [one.to(self.device) for one in image]
        sides = [(one.shape[-2], one.shape[-1]) for one in tokens]
        given = Given([one.expand(count, *one.shape[1:]) for one in tokens], kept_places(mask, sides, count))
        generators, seeds = generators_for(count, seed, generator)
        s = self.model.tokenizer.downsampling
        height, width = (s * side for side in sides[-1])
        negative = self._negative(negative_prompt, count)
        every = conditions * count
        return self._run(every, height, width, settings, generators, seeds, output_type, callback_on_step_end, given, negative)

    def settings(self, preset: str | None = None, guidance_scale: float | None = None, **said: Any) -> NextScaleSettings:
        """The settings that a call with these arguments has. ValueError says what is allowed."""
        if (steps := said.pop("num_inference_steps", None)) is not None:
            raise ValueError(f"num_inference_steps = {shown(steps)}; the scales follow from the size, leave it out")
        if unknown := sorted(set(said) - set(NAMES)):
            raise TypeError(f"unknown arguments {', '.join(unknown)}; settings are {', '.join(NAMES)}")
        guidance = None if guidance_scale is None else check_number("guidance_scale", guidance_scale)
        return choose(self.model.defaults, preset, guidance=guidance, **said)

    def _run(
        self,
        conditions: Sequence[Any],
        height: int,
        width: int,
        settings: NextScaleSettings,
        generators: Sequence[torch.Generator],
        seeds: list[int | None],
        output_type: str,
        callback: Callback | None,
        given: Given | None,
        negative: Sequence[str] | None,
    ) -> PictureOutput:
        with self._bar("scales", len(self.sides(height, width))) as bar:

            def on_block(done: int, total: int, tokens: list[Tensor]) -> None:
                bar.update()
                if callback is not None:
                    callback(self, done - 1, done / total, {"tokens": tokens})

            found = self.canvas(conditions, height, width, settings, generators, on_block, given, negative)
        decoded = output_type not in ("tokens", "bits")
        images = self._formed(self.decode_tensor(found.total, generators), output_type) if decoded else None
        classes = None if self.of_prompts else list(conditions)
        return PictureOutput(images, found.scales, seeds, classes)


def kept_places(mask: Any, sides: Sequence[Side], count: int) -> list[Tensor]:
    """A mask, white (or True) where something is drawn anew → which tokens of every scale stay, bool (B,h_k,w_k): where most
    of what a token covers stays; the first scale always. ValueError for a mask of another size."""
    if isinstance(mask, Image.Image):
        levels = torch.tensor(list(mask.convert("L").getdata())).view(mask.height, mask.width)
        keep = (levels < 128).float()
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        keep = (~mask.bool()).float()
    else:
        raise ValueError(f"the mask is {shown(mask)}; give a picture, white where it may change, or a bool tensor (h,w)")
    h, w = sides[-1]
    if keep.shape[0] % h or keep.shape[1] % w or keep.shape[0] // h != keep.shape[1] // w:
        raise ValueError(f"the mask is {keep.shape[1]}×{keep.shape[0]}; give one as large as the picture, or of {w}×{h} tokens")
    if not bool((keep == 0).any()):
        raise ValueError("the mask is black everywhere, so nothing would change; white says what is drawn anew")
    fine = F.adaptive_avg_pool2d(keep[None, None], (h, w)).floor()  # a token of the last scale stays where all of it does
    found = [F.interpolate(fine, side, mode="bilinear")[:, 0] > 0.5 for side in sides]
    found[0] = torch.ones_like(found[0])
    return [one.expand(count, -1, -1) for one in found]
