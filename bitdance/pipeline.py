"""What users hold: prompts in, pictures out.

from bitdance import BitDancePipeline
pipe = BitDancePipeline.from_pretrained("demo")
pipe("a red house", seed=1).images[0].save("house.png")
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bitdance.coding import PictureCoding, check_form, generators_for
from bitdance.folder.adapters import Adapter, restore
from bitdance.folder.checkpoint import load_model, save_model
from bitdance.folder.parts import DEMO
from bitdance.folder.sizes import check_size, default_size, size_rule
from bitdance.generate import OnBlock, generate_bits
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.heads.diffusion.settings import Sampling, choose
from bitdance.model import BitDanceModel
from bitdance.networks.kernels import use_onednn
from bitdance.networks.offload import Phase, PhaseOffload
from bitdance.networks.precision import AUTO, DTYPES, wanted_dtype
from bitdance.sequence.prompt import check_prompt, conditional_ids
from bitdance.sequence.vocabulary import unknown_words, with_guess
from bitdance.values import check_number, shown
from lfq_tokenizer.text import SHOWN, listed

NAMED_WORDS = 1000  # at most, so that a server does not remember all that strangers ask for
OUTPUT_TYPES = ("pil", "np", "pt", "bits")
Callback = Callable[["BitDancePipeline", int, float, dict[str, Any]], dict[str, Any] | None]


class BitDanceOutput(NamedTuple):
    """`images`: list of PIL pictures, array (B,H,W,3) or tensor (B,3,H,W) in [0,1], None for output_type "bits".
    `bits` (B,C,h,w) in {-1,+1}. `seeds`: what to pass as `seed` to get each picture again; None where a generator was
    passed.
    """

    images: list[Image.Image] | np.ndarray | Tensor | None
    bits: Tensor
    seeds: list[int | None]

    @property
    def tokens(self) -> Tensor:
        """The bits, under the name that they have for every kind of model."""
        return self.bits


class BitDancePipeline(PictureCoding):
    """Text → picture with a `BitDanceModel`, which stays reachable as `.model`."""

    kind = "next_patch"
    names = None  # of classes
    takes_negative = False

    def __init__(self, model: BitDanceModel, compile: bool | None = None) -> None:
        """`compile`: torch.compile and CUDA graphs for the head; None means on CUDA. ValueError when the model has no
        picture tokenizer (a model in training may go without)."""
        if model.tokenizer is None:
            raise ValueError("the model has no picture tokenizer; pictures need its decoder")
        self.model = model
        self._tokenizer = model.tokenizer
        self._block_sampler = BlockSampler(model.head, compile)
        use_onednn(model.backbone, model.projector, model.head)
        self._progress: dict[str, Any] = {}
        self._cancelled: set[int] = set()
        self._unknown: set[str] = set()  # words that a warning has named
        self.offload: PhaseOffload | None = None
        # weights that a loaded adapter has changed, and what the model said of itself
        self._without_lora: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool | None = None,
        quantize: str | None = None,
        quantize_head: str | None = None,
        lora: Path | str | None = None,
        lora_scale: float = 1.0,
        torch_dtype: torch.dtype | str | None = None,
    ) -> "BitDancePipeline":
        """A model folder in the published layout, or "demo", the bundled model. Nothing is downloaded.

        `device=None` is CUDA where there is one, else CPU. `dtype=None` is bfloat16 on CUDA, float32 elsewhere; "auto" is
        bfloat16 where `device` computes it quicker. `torch_dtype` is another name of `dtype`.
        `compile=None` compiles the head on CUDA (a minute at the first picture); False leaves that out.
        `quantize` ("int8" or "int4") keeps the LLM's matrices in 8 or 4 bits, `quantize_head` ("int8" or "fp8") the head's.
        `lora` adds an adapter for good, before anything is quantised; see `load_lora_weights`.
        FileNotFoundError when there is no such folder or file; ValueError when a file is broken or does not fit its
        config.
        """
        more: dict[str, Any] = {"quantize": quantize, "quantize_head": quantize_head, "lora": lora, "lora_scale": lora_scale}
        if dtype is not None and torch_dtype is not None:
            raise ValueError("dtype and torch_dtype are two names of one value; give one of them")
        target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(folder, target, wanted_dtype(torch_dtype if dtype is None else dtype, target), **more)
        return cls(model, compile)

    def save_pretrained(self, folder: Path | str, overwrite: bool = False) -> None:
        """Write the published layout (safetensors and JSON). ValueError when the folder is not empty, unless
        `overwrite`."""
        save_model(self.model, folder, overwrite=overwrite)

    def to(
        self,
        *targets: torch.device | torch.dtype | str | int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "BitDancePipeline":
        """Move the model to a device, a dtype or both, in place: `pipe.to("cuda")`, `pipe.to(torch.bfloat16)`, `pipe.to(device=…,
        dtype=…)`. ValueError for a quantised one, which stays where and as it was made."""
        for target in targets:
            if isinstance(target, torch.dtype) or target in DTYPES or target == AUTO:
                target, dtype = dtype, target
            else:
                target, device = device, target
            if target is not None:
                raise ValueError(f"to({', '.join(map(repr, targets))}): give one device and one dtype at most")
        if self.model.quantized and (device is not None or dtype is not None):
            raise ValueError("quantised weights keep device and dtype; load the model again with those that you want")
        if self.offload is not None:
            raise ValueError("the model moves by phases (enable_model_cpu_offload); load it again to have it in one place")
        self.model.to(device=device, dtype=wanted_dtype(dtype, self.device if device is None else torch.device(device)))
        return self

    @property
    def components(self) -> dict[str, Any]:
        """The parts of the model by name."""
        names = ("text_tokenizer", "backbone", "projector", "head", "tokenizer")
        return {name: getattr(self.model, name) for name in names}

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Move the model to main memory, and what a phase needs to `device` for that phase: LLM and head for prompt and loop,
        the decoder at the end (`bitdance.networks.offload`). Costs one copy of the LLM per call. ValueError for an unusable
        device."""
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device = {str(device)!r} cannot be used here ({str(error).splitlines()[0]})") from None
        self.offload = PhaseOffload(self.model, device)

    def load_lora_weights(self, folder: Path | str, scale: float = 1.0) -> None:
        """Add the adapter in `folder`, `scale` times, to the weights (see `bitdance.folder.adapters`). Pictures take no longer,
        and have the bits of the merged and exported model. What the weights were is kept in main memory for
        `unload_lora_weights`.

        FileNotFoundError or ValueError, before a weight is changed, for an adapter that is broken or of another base, and where
        weights are quantised or offloaded (load the model with `lora=` then), or an adapter is loaded already.
        """
        if self._without_lora is not None:
            raise ValueError("an adapter is loaded already; call unload_lora_weights() or fuse_lora() first")
        if self.offload is not None:
            raise ValueError("the model moves by phases; load the adapter with the model: from_pretrained(…, lora=…)")
        adapter = Adapter.read(folder, scale)
        if self.model.folder is not None:
            adapter.check_base(self.model.folder)
        extras = self.model.extras
        self._without_lora = adapter.add_to(self.model), extras

    def unload_lora_weights(self) -> None:
        """The weights of before `load_lora_weights`, bit for bit. Nothing happens without a loaded adapter."""
        if self._without_lora is not None:
            if self.offload is not None:
                raise ValueError("the model moves by phases; load it again, without the adapter")
            weights, self.model.extras = self._without_lora
            restore(self.model, weights)
        self._without_lora = None

    def fuse_lora(self) -> None:
        """Keep the loaded adapter for good and let go of the weights of before. It is part of the weights already."""
        self._without_lora = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.backbone.device if self.offload is None else self.offload.device

    def _enter(self, phase: Phase) -> None:
        if self.offload is not None:
            self.offload.enter(phase)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.model.backbone.parameters()).dtype

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the tqdm bar over blocks, for instance disable=True. By default it shows on a terminal only."""
        self._progress = options

    def cancel(self, i: int) -> None:
        """From a callback: no more work on picture `i` of the batch; the others go on, and their bits stay what they would be."""
        self._cancelled.add(i)

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "bits"] = "pil",
        callback_on_step_end: Callback | None = None,
        sampler: str | None = None,
        preset: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        last_steps: int | None = None,
        return_dict: bool = True,
    ) -> BitDanceOutput:
        """Make `num_images_per_prompt` pictures per prompt, all in one batch, the pictures of a prompt together.

        height, width         pixels; default: the model's own (published models: 1024×1024 or the nearest supported)
        num_inference_steps   solver steps per *block*, not per picture; default 50 or what the model's folder says
        guidance_scale        default 7.5; <= 1 leaves guidance out and halves the work
        seed                  one per picture. A single seed s serves n pictures as s, s + 1, …, s + n - 1. None draws
                              fresh ones. They come back in `.seeds`.
        generator             instead of seed: one per picture. A single generator serves one picture directly; for
                              n > 1 it draws n seeds (`torch.randint(0, 2**63 - 1, (n,))`), one per picture.
        output_type           "pil", "np" (B,H,W,3), "pt" (B,3,H,W), or "bits" (no decoding)
        callback_on_step_end  called as (pipe, block, t, {"bits": …, "tokens": the same}) after each block; t is
                              the finished share in (0, 1], unfinished bits are 0. What it returns is not read.
                              `pipe.cancel(i)` in it ends picture i, an exception the run.
        sampler               solver; default "euler_maruyama" (published), see `bitdance.heads.diffusion.sampler`
        preset                steps, sampler, interval and last steps at once ("published", …); what is said beside it wins
        guidance_interval     times in [0, 1] between which guidance acts (1 is the finished block)
        last_steps            steps of the last block; those between change linearly
        return_dict           for callers of diffusers; the output is an object and a tuple (images, bits, seeds) anyway

        A picture depends on its prompt, seed and settings, not on its neighbours in the batch. With one picture,
        float32 and CPU, the bits are those of the published pipeline for the same seed. All arguments are checked
        before any work; ValueError says what is allowed.
        """
        prompts = _prompts(prompt, num_images_per_prompt)
        defaults = self.model.extras.get("defaults", {})
        rule = size_rule(self.model)
        wished = default_size(rule)
        height, width = wished[0] if height is None else height, wished[1] if width is None else width
        check_size(rule, height, width)
        steps = None if num_inference_steps is None else check_number("num_inference_steps", num_inference_steps)
        guidance = None if guidance_scale is None else check_number("guidance_scale", guidance_scale)
        sampling = choose(
            defaults,
            preset,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            guidance_interval=guidance_interval,
            last_steps=last_steps,
        )
        check_form(output_type, OUTPUT_TYPES, callback_on_step_end)
        generators, seeds = generators_for(len(prompts), seed, generator)

        s = self._tokenizer.downsampling
        with self._bar(height * width // (s * self.model.patch_side) ** 2) as bar:

            def on_block(done: int, total: int, bits_BChw: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, done - 1, done / total, {"bits": bits_BChw, "tokens": bits_BChw})

            bits_BChw = self.generate(prompts, height, width, sampling, generators, on_block)
        images = None if output_type == "bits" else self.decode(bits_BChw, generators, output_type)
        return BitDanceOutput(images, bits_BChw, seeds)

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt as the model reads it; a batch of equal lengths wastes nothing."""
        return len(conditional_ids(self.model.text_tokenizer, prompt))

    def generate(
        self,
        prompts: Sequence[str],
        height: int,
        width: int,
        settings: Sampling,
        generators: Sequence[torch.Generator],
        on_block: OnBlock | None = None,
    ) -> Tensor:
        """One picture per prompt → bits (B,C,h,w) in {-1,+1}: what a call does once all is checked, for callers that have checked
        it. `on_block(done, M, bits_BChw)` as in `bitdance.generate.generate_bits`. A warning names the words of the prompts that
        the model was never taught, where its folder lists those that it was."""
        self._cancelled.clear()
        self._name_unknown_words(prompts)
        s = self._tokenizer.downsampling
        return generate_bits(
            self.model,
            prompts,
            height // s,
            width // s,
            settings,
            generators,
            on_block,
            block_sampler=self._block_sampler,
            enter=self._enter,
            cancelled=self._cancelled,
        )

    def _name_unknown_words(self, prompts: Sequence[str]) -> None:
        """Warn of words that the model was never taught, each of them once, and of no more than `NAMED_WORDS`."""
        unknown = [word for word in unknown_words(self.model.extras, prompts) if word not in self._unknown]
        if unknown and len(self._unknown) < NAMED_WORDS:
            self._unknown.update(unknown)
            folder = self.model.folder
            name = "demo" if folder == DEMO else folder
            more = "" if folder is None else f"; `bitdance info {name} --prompts` lists what it knows"
            words = [with_guess(word, self.model.extras) for word in unknown[:SHOWN]] + unknown[SHOWN:]
            warnings.warn(f"the model was never taught {listed(words, ', ')}{more}", stacklevel=3)

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, **{"desc": "blocks", "disable": not sys.stderr.isatty(), **self._progress})


def _prompts(prompt: Any, per_prompt: Any) -> list[str]:
    """One string per picture, the pictures of a prompt together."""
    per_prompt = check_number("num_images_per_prompt", per_prompt)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError(f"prompt = {shown(prompt)}; give a string or a list of at least one string")
    for i, text in enumerate(prompts):
        try:
            check_prompt(text)
        except ValueError as error:
            raise ValueError(f"prompt {i + 1} of {len(prompts)}: {error}") from error
    return [text for text in prompts for _ in range(per_prompt)]
