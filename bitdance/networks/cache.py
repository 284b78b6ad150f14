"""Keys and values of the positions so far, in room that is taken once: a new block is written behind the last one.

R rows, H key heads, L new positions, S positions so far, E width of a head.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class StaticCache(Cache):
    """For a known length, such as that of a picture: `capacity` positions, nothing is copied when it grows."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[_Layer(capacity) for _ in range(layers)])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[list(rows)], layer.values[list(rows)]


class _Layer(CacheLayerMixin):
    """One layer's share. What attention gets is a view of the filled part, so no mask has to hide the rest."""

    is_sliding = False
    is_compileable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        R, H, _, E = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(R, H, self.capacity, E)
        self.values = value_states.new_empty(R, H, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """New positions (R,H,L,E) → all positions so far (R,H,S,E). ValueError beyond the capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit into a cache of {self.capacity}")
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.24

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.length + (query_length if isinstance(query_length, int) else query_length.shape[0]), 0
