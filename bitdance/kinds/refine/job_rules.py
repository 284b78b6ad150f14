"""What `bitdance generate` asks of a refinement model."""

from typing import Any

from bitdance.jobs.picture_rules import PictureRules
from bitdance.kinds.refine.costs import COSTS
from bitdance.kinds.refine.folder import LAYOUT
from bitdance.kinds.refine.pipeline import RefinePipeline
from bitdance.kinds.refine.settings import NAMES, PRESETS, RefineSettings, choose


class JobRules(PictureRules):
    """See `PictureRules`."""

    layout, costs, pipeline = LAYOUT, COSTS, RefinePipeline
    presets = tuple(PRESETS)
    unknown = (*PictureRules.unknown, "sampler", "last_steps", "cfg_schedule")
    words = NAMES

    def sampling(self, said: dict[str, Any], preset: str | None, remade: bool) -> RefineSettings:
        """What was said, else the preset, else the model's defaults; of a picture that is made again, what it does not say is as
        `RefineSettings` has it."""
        return choose({} if remade else self._found.extras.get("defaults", {}), preset, **said)
