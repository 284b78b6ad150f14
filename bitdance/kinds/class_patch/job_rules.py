"""What `bitdance generate` asks of a class-conditional model."""

from typing import Any

from bitdance.jobs.picture_rules import PictureRules
from bitdance.kinds.class_patch.costs import COSTS
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.kinds.class_patch.pipeline import ClassPipeline
from bitdance.kinds.class_patch.settings import PRESETS, ClassSettings, choose


class JobRules(PictureRules):
    """See `PictureRules`."""

    layout, costs, pipeline = LAYOUT, COSTS, ClassPipeline
    presets = tuple(PRESETS)
    unknown = (*PictureRules.unknown, "tau", "schedule")

    def sampling(self, said: dict[str, Any], preset: str | None, remade: bool) -> ClassSettings:
        """What was said, else the preset, else the model's defaults; of a picture that is made again, what it does not say is as
        published."""
        schedule = said.pop("cfg_schedule", "linear" if remade else None)
        return choose(self._found.extras.get("defaults", {}), preset, schedule, **said)
