"""The backbone of `bitdance`, called so that hooks on the language model's `forward` fire: offloading of accelerate and diffusers
places and removes weights there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdance.networks.backbone import Backbone


class HookedBackbone(Backbone):
    """`place()` is the device of the computation, wherever the weights lie meanwhile. Computes no text output."""

    def __init__(self, lm: Any, place: Callable[[], torch.device]) -> None:
        super().__init__(lm)
        self._place = place

    @property
    def device(self) -> torch.device:
        return self._place()

    def embed(self, ids: Tensor) -> Tensor:
        """The ids themselves: the rows are looked up inside `forward`, when hooks have brought the embedding."""
        return ids

    def _states(self, inputs_embeds_BLD: Tensor, **arguments: Any) -> Tensor:
        found: list[Any] = []
        watch = self.lm.base_model.register_forward_hook(lambda module, args, output: found.append(output))
        name = "inputs_embeds" if inputs_embeds_BLD.is_floating_point() else "input_ids"
        nothing = torch.empty(0, dtype=torch.long, device=inputs_embeds_BLD.device)
        try:
            self.lm(**{name: inputs_embeds_BLD}, **arguments, logits_to_keep=nothing)
        finally:
            watch.remove()
        states_BLD: Tensor = found[0].last_hidden_state
        return states_BLD
