"""What `bitdance generate` asks of a class-conditional model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitdance.folder.sizes import Size
from bitdance.jobs.job import Request
from bitdance.kinds.class_patch.costs import check_memory
from bitdance.kinds.class_patch.facts import fingerprint
from bitdance.kinds.class_patch.folder import check_folder
from bitdance.kinds.class_patch.pipeline import ClassPipeline
from bitdance.kinds.class_patch.settings import ClassSettings, choose
from bitdance.networks.precision import DTYPES
from bitdance.values import check_number

ALL = "all"
_RANDOM = re.compile("random:([1-9][0-9]{0,6})")


class JobRules:
    """A folder that is whole; its weights are not loaded. `unknown`: options of the command that are not for such a model."""

    unknown = ("lora", "lora_scale", "quantize", "quantize_head", "offload")

    def __init__(self, folder: Path) -> None:
        self.folder, self._found = folder, check_folder(folder)

    @property
    def default_size(self) -> Size:
        """(height, width), the only one."""
        return self._found.side, self._found.side

    def check_size(self, height: int, width: int) -> None:
        """ValueError for a size that the model does not make."""
        for name, side in (("height", height), ("width", width)):
            check_number(name, side)
        if (height, width) != self.default_size:
            only = "×".join(map(str, self.default_size))
            raise ValueError(f"height {height} × width {width} is not supported: this model makes pictures of {only} pixels only")

    def sampling(self, said: dict[str, Any], preset: str | None, remade: bool) -> ClassSettings:
        """What was said, else the preset, else the model's defaults; of a picture that is made again, what it does not say is as
        published."""
        defaults = self._found.extras.get("defaults", {})
        schedule = said.pop("cfg_schedule", "linear" if remade else None)
        return choose(defaults, preset, schedule, **said)

    def requests(self, request: Request) -> Iterator[Request]:
        """The request with its class's number and name, one for each class ("all"), or so many of classes drawn at random with
        seeds that count up ("random:50000"; always the same). ValueError for a prompt, and for what is no class."""
        if request.label is None:
            raise ValueError(f"{request.source}: this model makes pictures of classes; give --class N|NAME|all, no prompt")
        names = self._found.names
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
        return fingerprint(self.folder)

    def load(self, order: Any) -> ClassPipeline:
        """The pipeline of a run. ValueError, before a weight is read, when its batches do not fit into the memory."""
        batch, guided = min(order.batch_size, len(order.jobs)), any(guided for _, _, guided in order.sizes)
        check_memory(self._found, batch, DTYPES[order.dtype].itemsize, guided, order.device, order.model)
        return ClassPipeline.from_pretrained(self.folder, order.device, order.dtype, generation_only=True)
