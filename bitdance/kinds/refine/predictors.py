"""The two networks as the loop asks them: conditions first, then labels and times to logits.

B pictures, G labels per token, V values of a label, h w token grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitdance.kinds.refine.class_network import ClassRefineNetwork
from bitdance.kinds.refine.text_network import TextMemory, TextRefineNetwork


class ClassPredictor:
    """See `loop.Predictor`. Both branches are computed in one call."""

    by_token = False

    def __init__(self, network: ClassRefineNetwork, classes: Sequence[int]) -> None:
        self.network, self.config, self.device = network, network.config, network.pos_embed.device
        self.class_B = torch.tensor(list(classes), device=self.device)

    def logits(self, pictures: Sequence[int], labels_BGhw: Tensor, time_B: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        class_B = self.class_B[list(pictures)]
        if not guided:
            return self.network(labels_BGhw, time_B, class_B), None
        classes = torch.cat([class_B, torch.full_like(class_B, self.network.null_class)])
        with_class, without = self.network(labels_BGhw.repeat(2, 1, 1, 1), time_B.repeat(2), classes).chunk(2)
        return with_class, without


class TextPredictor:
    """See `loop.Predictor`. Rows whose prompts have equally many tokens share a call, so nothing is padded."""

    by_token = True

    def __init__(self, network: TextRefineNetwork, features: Sequence[Tensor], negative: Sequence[Tensor]) -> None:
        """Features (T,E) of each picture's prompt, and of what stands for no prompt."""
        self.network, self.config, self.device = network, network.config, network.text_proj.weight.device
        self._features = [*features, *negative]  # the second half: without their prompt
        self._count = len(features)
        self._memories: dict[tuple[int, ...], TextMemory] = {}

    def logits(self, pictures: Sequence[int], labels_BGhw: Tensor, time_B: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        B = len(pictures)
        rows = [*pictures, *[self._count + p for p in pictures]] if guided else list(pictures)
        found: list[Tensor] = [labels_BGhw] * len(rows)
        by_length: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            by_length.setdefault(len(self._features[row]), []).append(place)
        for places in by_length.values():
            which = [place % B for place in places]
            memory = self._memory(tuple(rows[place] for place in places))
            for place, logits in zip(places, self.network(labels_BGhw[which], time_B[which], memory), strict=True):
                found[place] = logits
        return torch.stack(found[:B]), torch.stack(found[B:]) if guided else None

    def _memory(self, rows: tuple[int, ...]) -> TextMemory:
        """Of these rows, which are asked for again at the next step."""
        if rows not in self._memories:
            features_BTE = torch.stack([self._features[row] for row in rows]).to(self.device)
            self._memories[rows] = self.network.prepare(features_BTE, [features_BTE.shape[1]] * len(rows))
        return self._memories[rows]
