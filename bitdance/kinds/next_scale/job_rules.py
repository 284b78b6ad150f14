"""What `bitdance generate` asks of a next-scale model."""

from collections.abc import Iterator
from typing import Any

from bitdance.jobs.job import Request
from bitdance.jobs.picture_rules import PictureRules
from bitdance.kinds.next_scale.costs import COSTS
from bitdance.kinds.next_scale.folder import LAYOUT
from bitdance.kinds.next_scale.pipeline import NextScalePipeline
from bitdance.kinds.next_scale.schedule import schedule_of
from bitdance.kinds.next_scale.settings import NAMES, PRESETS, NextScaleSettings, choose
from bitdance.values import check_number


class JobRules(PictureRules):
    """See `PictureRules`."""

    layout, costs, pipeline = LAYOUT, COSTS, NextScalePipeline
    presets = tuple(PRESETS)
    unknown = (*PictureRules.unknown, "sampler", "last_steps", "steps", "guidance_interval", "schedule")
    words = NAMES

    def check_size(self, height: int, width: int, settings: Any = None) -> None:
        """ValueError for a size that the model does not make, and for settings of another number of scales than it has."""
        config, s = self._found.config, self._found.tokenizer.downsampling
        for name, side in (("height", height), ("width", width)):
            check_number(name, side)
        sides = list(config.sides)
        if (height, width) != self.default_size:
            if not config.rotary:
                super().check_size(height, width)
            if height % s or width % s:
                raise ValueError(f"height {height} × width {width} is not supported: both must be multiples of {s}")
            sides = list(schedule_of((height // s, width // s)))
        if settings is not None:
            settings.check_scales(len(sides))

    def sampling(self, said: dict[str, Any], preset: str | None, remade: bool) -> NextScaleSettings:
        """What was said, else the preset, else the model's defaults; of a picture that is made again, what it does not say is as
        `NextScaleSettings` has it."""
        settings = choose({} if remade else self._found.extras.get("defaults", {}), preset, **said)
        return settings.changed(steps=len(self._found.config.sides))

    def requests(self, request: Request) -> Iterator[Request]:
        """See `PictureRules`. ValueError for a number of steps, which follows from the size."""
        if request.steps is not None:
            raise ValueError(f"{request.source}: steps = {request.steps}; the scales follow from the size, leave it out")
        yield from super().requests(request)
