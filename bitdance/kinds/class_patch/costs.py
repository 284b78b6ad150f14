"""The memory that pictures of classes take."""

from bitdance.costs.picture_model import Costs
from bitdance.kinds.class_patch.config import ClassPatchConfig
from bitdance.kinds.class_patch.folder import LAYOUT


def working(c: ClassPatchConfig, batch: int, itemsize: int, guided: bool) -> dict[str, int]:
    """Keys and values of the batch."""
    positions = c.cls_token_num + c.parallel_num - 1 + c.num_tokens
    return {"cache": itemsize * 2 * c.n_layer * batch * (1 + guided) * positions * c.dim}


COSTS = Costs(LAYOUT, working)
