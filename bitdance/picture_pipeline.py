"""What users hold of a model that has one network beside the picture tokenizer: the part that does not depend on the kind."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bitdance.coding import FORMS, PictureCoding
from bitdance.folder.picture_model import Layout, PictureModel
from bitdance.networks.kernels import use_onednn
from bitdance.networks.precision import AUTO, DTYPES, wanted_dtype
from bitdance.sequence.classes import ClassNames
from bitdance.values import check_number, shown

OUTPUT_TYPES = (*FORMS, "tokens", "bits")
OutputType = Literal["pil", "np", "pt", "tokens", "bits"]
OF_CLASSES = "this model makes pictures of classes; give class_label, a number or a name, and no prompt"
OF_PROMPTS = "this model makes pictures of prompts; give a prompt, and no class_label"


class PictureOutput(NamedTuple):
    """`images`: list of PIL pictures, array (B,H,W,3) or tensor (B,3,H,W) in [0,1], None for output_type "tokens"; of a cancelled
    picture what its unfinished tokens decode to. `tokens`: bits (B,C,h,w) in {-1,+1}, 0 where a cancelled picture is unfinished.
    `seeds`: what to pass as `seed` to get each picture again, None where a generator was passed. `classes`: their numbers, None
    for pictures of prompts. `steps`: how many each picture took, where that differs.
    """

    images: list[Image.Image] | np.ndarray | Tensor | None
    tokens: Tensor
    seeds: list[int | None]
    classes: list[int] | None = None
    steps: list[int] | None = None

    @property
    def bits(self) -> Tensor:
        """The tokens, which are bits."""
        return self.tokens


class PicturePipeline(PictureCoding):
    """A loaded `PictureModel`, which stays reachable as `.model`. A kind adds how it generates."""

    layout: ClassVar[Layout[Any]]
    offload = None  # of BitDance's text models

    def __init__(self, model: PictureModel) -> None:
        self.model = model
        self._tokenizer = model.tokenizer
        use_onednn(model.network)
        self._progress: dict[str, Any] = {}
        self._cancelled: set[int] = set()

    @property
    def kind(self) -> str:
        """Which way of generating this is."""
        return self.layout.kind

    @property
    def names(self) -> ClassNames | None:
        """The classes of the model, None where it makes pictures of prompts."""
        return self.model.names

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: Any = None, dtype: Any = None, generation_only: bool = False) -> Self:
        """A model folder of this kind. Nothing is downloaded. `device=None` is CUDA where there is one, else CPU; `dtype=None`
        is bfloat16 on CUDA, float32 elsewhere. `generation_only` leaves out the picture encoder; such a model cannot be saved.
        FileNotFoundError or ValueError name the file that is missing, broken or does not fit."""
        target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        wanted = wanted_dtype(dtype, target) or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        return cls(cls.layout.load(Path(folder), target, wanted, generation_only))

    def save_pretrained(self, folder: Path | str, overwrite: bool = False) -> None:
        """Write the model folder. ValueError when it is not empty, unless `overwrite`."""
        self.layout.save(self.model, Path(folder), overwrite)

    def to(self, *targets: Any) -> Self:
        """Move the model to a device, a dtype or both, in place: `pipe.to("cuda")`, `pipe.to(torch.bfloat16)`."""
        for target in targets:
            dtype = isinstance(target, torch.dtype) or target in (*DTYPES, AUTO)
            where = wanted_dtype(target, self.device) if dtype else torch.device(target)
            for part in (self.model.network, self.model.tokenizer, self.model.text):
                if part is not None:
                    part.to(where)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.model.network.parameters()).dtype

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the tqdm bar over steps, for instance disable=True. By default it shows on a terminal only."""
        self._progress = options

    def _bar(self, unit: str, total: int) -> tqdm:
        return tqdm(total=total, **{"desc": unit, "disable": not sys.stderr.isatty(), **self._progress})

    def cancel(self, i: int) -> None:
        """From a callback: no more work on picture `i` of the batch; the others go on, and their bits stay what they would be."""
        self._cancelled.add(i)

    @property
    def of_prompts(self) -> bool:
        """Whether the model makes pictures of prompts, not of classes."""
        return self.names is None

    @property
    def takes_negative(self) -> bool:
        """Whether a prompt may have another one against it."""
        return self.of_prompts

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt; pictures of equal lengths share a call of the network."""
        assert self.model.text is not None
        return len(self.model.text.reader.ids(prompt))

    def _classes(self, class_label: Any, prompt: Any, each: int) -> list[int]:
        """The class numbers of a call, each so many times. ValueError without a class, and for a prompt."""
        if prompt is not None or class_label is None or self.names is None:
            raise ValueError(OF_CLASSES)
        return [number for number in self.names.numbers_of(class_label) for _ in range(each)]

    def _conditions(self, prompt: Any, class_label: Any, each: int) -> list[Any]:
        """The prompts or class numbers of a call, each so many times. ValueError for the one that the model does not take."""
        if not self.of_prompts:
            return self._classes(class_label, prompt, each)
        if prompt is None or class_label is not None:
            raise ValueError(OF_PROMPTS)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt = {shown(prompt)}; give a string or a list of strings")
        return [text for text in prompts for _ in range(each)]

    def _check_only_size(self, height: Any, width: Any) -> None:
        """ValueError for another size than the one of a class model."""
        only = self.model.sizes[0]
        for name, value, side in (("height", height, only[0]), ("width", width, only[1])):
            if value is not None and check_number(name, value) != side:
                raise ValueError(f"{name} = {value}; this model makes pictures of {only[0]}×{only[1]} pixels only")

    def _size(self, height: Any, width: Any) -> tuple[int, int]:
        if not self.of_prompts:
            self._check_only_size(height, width)
        default, s = self.model.sizes[0], self.model.tokenizer.downsampling
        found = []
        for name, value, usual in (("height", height, default[0]), ("width", width, default[1])):
            side = usual if value is None else check_number(name, value)
            if side % s:
                near = max(s, round(side / s) * s)
                raise ValueError(f"{name} = {side}; a multiple of {s} is allowed, for instance {near}")
            found.append(side)
        return found[0], found[1]

    def _negative(self, prompt: Any, count: int) -> list[str] | None:
        if prompt is None:
            return None
        if not self.of_prompts or not isinstance(prompt, str):
            raise ValueError(f"negative_prompt = {shown(prompt)}; a string is allowed, for models of prompts")
        return [prompt] * count

    def _output(
        self,
        bits_BChw: Tensor,
        generators: Sequence[torch.Generator],
        output_type: str,
        seeds: list[int | None],
        **more: Any,
    ) -> PictureOutput:
        images = None if output_type in ("tokens", "bits") else self.decode(bits_BChw, generators, output_type)
        return PictureOutput(images, bits_BChw, seeds, **more)
