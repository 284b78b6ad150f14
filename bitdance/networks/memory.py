"""Keys and values of a transformer of our own, for one batch of pictures.

B rows, H heads, L new positions, S positions so far, E width of a head.
"""

from collections.abc import Sequence

from torch import Tensor


class Memory:
    """Keys and values of one layer in room that is taken once; what attention gets is a view of the filled part."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._kept: tuple[Tensor, Tensor] | None = None

    def add(self, key_BHLE: Tensor, value_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """New positions → all positions so far (B,H,S,E)."""
        if self._kept is None:
            B, H, _, E = key_BHLE.shape
            self._kept = key_BHLE.new_empty(B, H, self.capacity, E), value_BHLE.new_empty(B, H, self.capacity, E)
        start, self.length = self.length, self.length + key_BHLE.shape[2]
        assert self.length <= self.capacity, f"{self.length} positions in a memory for {self.capacity}"
        for kept, new in zip(self._kept, (key_BHLE, value_BHLE)):
            kept[:, :, start : self.length] = new
        keys, values = (kept[:, :, : self.length] for kept in self._kept)
        return keys, values

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        if self._kept is not None:
            keys, values = (kept[list(rows)] for kept in self._kept)
            self._kept = keys, values
