"""What `bitdance generate` asks of a model with one network beside the picture tokenizer: of classes, or of prompts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bitdance.costs.picture_model import Costs
from bitdance.folder.picture_model import Layout
from bitdance.folder.sizes import Size
from bitdance.jobs.job import Request
from bitdance.networks.precision import DTYPES
from bitdance.picture_pipeline import PicturePipeline
from bitdance.values import check_number

ALL = "all"
_RANDOM = re.compile("random:([1-9][0-9]{0,6})")


class PictureRules:
    """A folder that is whole; its weights are not loaded. `presets`: names of settings; `unknown`:
    options of the command that are not for such a model."""

    layout: ClassVar[Layout[Any]]
    costs: ClassVar[Costs]
    pipeline: ClassVar[type[PicturePipeline]]
    presets: ClassVar[tuple[str, ...]]
    unknown: ClassVar[tuple[str, ...]] = ("lora", "lora_scale", "quantize", "quantize_head", "offload")

    def __init__(self, folder: Path) -> None:
        self.folder, self._found = folder, self.layout.check(folder)

    @property
    def default_size(self) -> Size:
        """(height, width) where nothing is said."""
        return self._found.sizes[0]

    def check_size(self, height: int, width: int, settings: Any = None) -> None:
        """ValueError for a size that the model does not make, or not with these settings."""
        for name, side in (("height", height), ("width", width)):
            check_number(name, side)
        s = self._found.tokenizer.downsampling
        if self._found.names is None and (height % s or width % s):
            raise ValueError(f"height {height} × width {width} is not supported: both must be multiples of {s}")
        if self._found.names is not None and (height, width) != self.default_size:
            only = "×".join(map(str, self.default_size))
            raise ValueError(f"height {height} × width {width} is not supported: this model makes pictures of {only} pixels only")

    def requests(self, request: Request) -> Iterator[Request]:
        """The request with its class's number and name, one for each class ("all"), or so many of classes drawn at random with
        seeds that count up ("random:50000"; always the same); of a model of prompts as it is. ValueError for a prompt where there
        are classes and the reverse, and for what is no class."""
        names = self._found.names
        if names is None:
            if request.label is not None:
                raise ValueError(f"{request.source}: this model makes pictures of prompts; a class needs a class model (--model)")
            yield request
            return
        if request.label is None:
            raise ValueError(f"{request.source}: this model makes pictures of classes; give --class N|NAME|all, no prompt")
        if isinstance(request.label, str) and (found := _RANDOM.fullmatch(request.label)):
            first = request.seed or 0
            for k, drawn in enumerate(np.random.default_rng(0).integers(len(names), size=int(found[1])).tolist()):
                yield request._replace(label=drawn, name=names.name(drawn), seed=first + k, n=1)
            return
        if request.label == ALL:
            numbers = list(range(len(names)))
        else:
            try:
                numbers = [names.number(request.label)]
            except ValueError as error:
                raise ValueError(f"{request.source}: {error}") from None
        for number in numbers:
            yield request._replace(label=number, name=names.name(number))

    def fingerprint(self) -> str:
        """What tells the model from others."""
        return self.layout.fingerprint(self.folder)

    def load(self, spec: Any) -> PicturePipeline:
        """The pipeline of a run. ValueError, before a weight is read, when its batches do not fit into the memory."""
        batch, guided = min(spec.batch_size, len(spec.jobs)), any(guided for _, _, guided in spec.sizes)
        self.costs.check_memory(self._found, batch, DTYPES[spec.dtype].itemsize, guided, spec.device, spec.model)
        return self.pipeline.from_pretrained(self.folder, spec.device, spec.dtype, generation_only=True)
