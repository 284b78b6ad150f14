"""Keys and values of a transformer of our own, for one batch of pictures.

B rows, H heads, L new positions, S positions so far, E width of a head.
"""

from collections.abc import Callable, Sequence

from torch import Tensor


class Memory:
    """Keys and values of one layer in room that is taken once; what attention gets is a view of the filled part."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._kept: tuple[Tensor, Tensor] | None = None
        self._fixed: dict[str, Tensor] = {}

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

    def fixed(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What follows from the condition alone (rows first), made once for all positions."""
        if name not in self._fixed:
            self._fixed[name] = make()
        return self._fixed[name]

    def back_to(self, length: int) -> None:
        """Forget the positions from `length` on; at 0 the condition too."""
        self.length = length
        if not length:
            self._fixed.clear()

    def copied(self, length: int) -> "Memory":
        """Another one with the first `length` positions and the same condition."""
        other = Memory(self.capacity)
        other.length, other._fixed = length, dict(self._fixed)
        if self._kept is not None:
            keys, values = (kept.clone() for kept in self._kept)
            other._kept = keys, values
        return other

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        which = list(rows)
        self._fixed = {name: tensor[which] for name, tensor in self._fixed.items()}
        if self._kept is not None:
            keys, values = (kept[which] for kept in self._kept)
            self._kept = keys, values
