"""The memory that next-scale prediction takes: keys and values of all scales, and the logits of the largest."""

from bitdance.costs.picture_model import Costs
from bitdance.kinds.next_scale.config import NextScaleConfig
from bitdance.kinds.next_scale.folder import LAYOUT


def working(c: NextScaleConfig, batch: int, itemsize: int, guided: bool) -> dict[str, int]:
    """Of a picture of the size that the model was trained with."""
    rows, (h, w) = batch * (1 + guided), c.sides[-1]
    cache = itemsize * 2 * c.depth * rows * c.length * c.width
    return {"cache": cache, "logits": 4 * (rows + 3 * batch) * h * w * c.outputs}


COSTS = Costs(LAYOUT, working)
