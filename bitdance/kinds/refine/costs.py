"""The memory that refinement takes: there is no cache of the past, only what one step holds."""

from bitdance.costs.picture_model import Costs
from bitdance.kinds.refine.config import ClassRefineConfig, RefineConfig
from bitdance.kinds.refine.folder import LAYOUT


def working(c: RefineConfig, batch: int, itemsize: int, guided: bool) -> dict[str, int]:
    """The inside of one block, and logits with their random numbers in float32."""
    rows, (h, w) = batch * (1 + guided), c.grids[0]  # type: ignore[attr-defined]
    before = c.in_context_len if isinstance(c, ClassRefineConfig) else 1
    inside = itemsize * rows * (h * w + before) * 14 * c.width
    return {"block": inside, "logits": 4 * (rows + 3 * batch) * h * w * c.label_count * c.values}


COSTS = Costs(LAYOUT, working)
