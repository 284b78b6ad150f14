"""The backbone of `bitdance`, called so that hooks on the language model's `forward` fire: offloading of accelerate and diffusers
places and removes weights there."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bitdance.attention import padding_runs
from bitdance.backbone import Backbone


class HookedBackbone(Backbone):
    """`place()` is the device of the computation, wherever the weights lie meanwhile."""

    def __init__(self, lm: Any, place: Callable[[], torch.device]) -> None:
        super().__init__(lm)
        self._place = place

    @property
    def device(self) -> torch.device:
        return self._place()

    def embed(self, ids: Tensor) -> Tensor:
        """The ids themselves: the rows are looked up inside `forward`, when hooks have brought the embedding."""
        return ids

    def forward(
        self,
        inputs_embeds_BLD: Tensor,
        position_BL: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: Any = None,
        causal: bool = True,
        padding: Sequence[int] | None = None,
    ) -> Tensor:
        """As `Backbone.forward`, or with ids (B,L) as its first argument. Computes no text output."""
        found: list[Any] = []
        watch = self.lm.base_model.register_forward_hook(lambda module, args, output: found.append(output))
        is_ids = not inputs_embeds_BLD.is_floating_point()
        try:
            self.lm(
                **{"input_ids" if is_ids else "inputs_embeds": inputs_embeds_BLD},
                attention_mask=mask,
                position_ids=position_BL,
                use_cache=cache is not None,
                is_causal=causal,
                logits_to_keep=torch.empty(0, dtype=torch.long, device=inputs_embeds_BLD.device),
                **({} if padding is None else {"runs": padding_runs(padding)}),
                **{self._cache_name: cache},
            )
        finally:
            watch.remove()
        return found[0].last_hidden_state
