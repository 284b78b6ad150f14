"""The endless row of samples: a fresh permutation every epoch, one after the other.

The permutation is a Feistel network over the sample numbers, so no list is ever shuffled or kept: a data set of a billion samples
costs as little memory in every loader process as one of ten.
"""

import hashlib

ROUNDS = 6  # of the network; four are already indistinguishable from chance to whoever does not know the key


class EpochOrder:
    """Which of `length` samples stands at a place of the row: a pure function of the seed.

    Within an epoch every sample comes exactly once.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1 or seed < 0:
            raise ValueError(f"length {length} and seed {seed} must be positive")
        self.length, self.seed = length, seed
        self._half = max(1, ((length - 1).bit_length() + 1) // 2)  # bits of each half; both together hold any sample number

    def at(self, place: int) -> int:
        """The sample at `place`, counted from 0."""
        epoch, number = divmod(place, self.length)
        while True:  # numbers beyond the last sample are sent through again, at most a few times
            number = self._exchanged(number, epoch)
            if number < self.length:
                return number

    def _exchanged(self, number: int, epoch: int) -> int:
        """A permutation of all numbers of 2·half bits: each round changes one half by a hash of the other: it can be undone."""
        mask = (1 << self._half) - 1
        left, right = number >> self._half, number & mask
        for turn in range(ROUNDS):
            digest = hashlib.blake2b(f"{self.seed} {epoch} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        return left << self._half | right
