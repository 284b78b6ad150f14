"""What users hold of a class-conditional model: classes in, pictures out.

from bitdance import load_pipeline
pipe = load_pipeline("folder")
pipe(class_label="golden retriever", seed=1).images[0].save("dog.png")
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bitdance.coding import FORMS, PictureCoding, check_form, generators_for
from bitdance.heads.diffusion.block_sampler import BlockSampler
from bitdance.kinds.class_patch.folder import KIND, ClassModel, load, save
from bitdance.kinds.class_patch.generate import OnBlock, generate_bits
from bitdance.kinds.class_patch.settings import ClassSettings, choose
from bitdance.networks.kernels import use_onednn
from bitdance.networks.precision import AUTO, DTYPES, wanted_dtype
from bitdance.values import check_number

OUTPUT_TYPES = (*FORMS, "tokens", "bits")
Callback = Callable[["ClassPipeline", int, float, dict[str, Any]], Any]


class ClassOutput(NamedTuple):
    """`images`: list of PIL pictures, array (B,H,W,3) or tensor (B,3,H,W) in [0,1], None for output_type "tokens"; of a cancelled
    picture what its unfinished tokens decode to. `tokens`: bits (B,C,h,w) in {-1,+1}, 0 where a cancelled picture is unfinished.
    `seeds`: what to pass as `seed` to get each picture again, None where a generator was passed. `classes`: their numbers.
    """

    images: list[Image.Image] | np.ndarray | Tensor | None
    tokens: Tensor
    seeds: list[int | None]
    classes: list[int]

    @property
    def bits(self) -> Tensor:
        """The tokens, which are bits."""
        return self.tokens


class ClassPipeline(PictureCoding):
    """Class → picture with a `ClassModel`, which stays reachable as `.model`; `.names` are its classes."""

    kind = KIND

    def __init__(self, model: ClassModel) -> None:
        self.model, self.names = model, model.names
        self._tokenizer = model.tokenizer
        # OURS: no CUDA graphs yet. One is recorded for one guidance, and here every block has its own.
        self._block_sampler = BlockSampler(model.network.head, compile=False)
        use_onednn(model.network)
        self._progress: dict[str, Any] = {}
        self._cancelled: set[int] = set()

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, device: Any = None, dtype: Any = None, generation_only: bool = False
    ) -> "ClassPipeline":
        """A model folder of this kind. Nothing is downloaded. `device=None` is CUDA where there is one, else CPU; `dtype=None`
        is bfloat16 on CUDA, float32 elsewhere. `generation_only` leaves out the picture encoder; such a model cannot be saved.
        FileNotFoundError or ValueError name the file that is missing, broken or does not fit."""
        target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        wanted = wanted_dtype(dtype, target) or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        return cls(load(Path(folder), target, wanted, generation_only))

    def save_pretrained(self, folder: Path | str, overwrite: bool = False) -> None:
        """Write the model folder. ValueError when it is not empty, unless `overwrite`."""
        save(self.model, Path(folder), overwrite)

    def to(self, *targets: Any) -> "ClassPipeline":
        """Move the model to a device, a dtype or both, in place: `pipe.to("cuda")`, `pipe.to(torch.bfloat16)`."""
        for target in targets:
            dtype = isinstance(target, torch.dtype) or target in (*DTYPES, AUTO)
            where = wanted_dtype(target, self.device) if dtype else torch.device(target)
            self.model.network.to(where)
            self.model.tokenizer.to(where)
        return self

    offload = None  # of text models

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.network.pos_for_diff.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.network.pos_for_diff.weight.dtype

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the tqdm bar over blocks, for instance disable=True. By default it shows on a terminal only."""
        self._progress = options

    def cancel(self, i: int) -> None:
        """From a callback: no more work on picture `i` of the batch; the others go on, and their bits stay what they would be."""
        self._cancelled.add(i)

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
        output_type: Literal["pil", "np", "pt", "tokens", "bits"] = "pil",
        callback_on_step_end: Callback | None = None,
        sampler: str | None = None,
        preset: str | None = None,
        cfg_schedule: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        last_steps: int | None = None,
        prompt: None = None,
    ) -> ClassOutput:
        """Make `num_images_per_class` pictures per class, all in one batch, the pictures of a class together.

        class_label           a class's number, one of its names or its WordNet id, or a list of them; `pipe.names` knows them
        height, width         pixels; a class model makes one size, `pipe.model.side`
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
        if prompt is not None or class_label is None:
            raise ValueError("this model makes pictures of classes; give class_label, a number or a name, and no prompt")
        each = check_number("num_images_per_prompt", num_images_per_class)
        classes = [number for number in self.names.numbers_of(class_label) for _ in range(each)]
        for name, value in (("height", height), ("width", width)):
            if value is not None and check_number(name, value) != self.model.side:
                size = f"{self.model.side}×{self.model.side}"
                raise ValueError(f"{name} = {value}; this model makes pictures of {size} pixels only")
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

        options = {"desc": "blocks", "disable": not sys.stderr.isatty(), **self._progress}
        with tqdm(total=self.model.network.config.num_blocks, **options) as bar:

            def on_block(done: int, total: int, bits_BChw: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, done - 1, done / total, {"tokens": bits_BChw})

            bits_BChw = self.generate(classes, self.model.side, self.model.side, settings, generators, on_block)
        images = None if output_type in ("tokens", "bits") else self.decode(bits_BChw, generators, output_type)
        return ClassOutput(images, bits_BChw, seeds, classes)
