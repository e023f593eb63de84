"""The order in which training goes through the windows of a token file.

No file is read here, and nothing depends on how many ranks share the work.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
SMALLEST_HALF_BITS = 3  # a Feistel network on fewer bits reaches only some of the permutations


class GlobalOrder:
    """The endless order of training samples: every epoch a new permutation of all windows.

    A permutation is computed, not stored: a Feistel network on the window's number, with cycle walking down
    to `windows` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Memory does not grow with
    `windows`.
    """

    def __init__(self, windows: int, seed: int) -> None:
        assert 1 <= windows < 1 << 62, f"windows={windows}"
        self.windows = windows
        self.seed = seed
        self._half_bits = np.uint64(max(SMALLEST_HALF_BITS, -(-(windows - 1).bit_length() // 2)))

    def index(self, sample: int) -> int:
        """Return the window of sample number `sample`, counted from 0 at the start of training."""
        return int(self.indices(sample, 1)[0])

    def indices(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the windows of samples `first` to `first + count - 1`: int64 [count]."""
        assert first >= 0 and count >= 0, f"first={first} count={count}"
        epochs, positions = np.divmod(np.arange(first, first + count, dtype=np.int64), self.windows)
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = np.array([self._round_keys(int(epoch)) for epoch in distinct], dtype=np.uint64).reshape(-1, ROUNDS)
        keys = keys[which]
        numbers = self._feistel(positions.astype(np.uint64), keys)
        while len(outside := np.flatnonzero(numbers >= self.windows)):
            numbers[outside] = self._feistel(numbers[outside], keys[outside])
        return numbers.astype(np.int64)

    def _round_keys(self, epoch: int) -> NDArray[np.uint64]:
        digest = hashlib.blake2b(f"{self.seed}/samples/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def _feistel(self, numbers: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Permute numbers below 4**half_bits, each by its row of keys [numbers, ROUNDS].

        Each round swaps the halves and mixes one into the other.
        """
        mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = numbers >> self._half_bits, numbers & mask
        for key in keys.T:
            left, right = right, left ^ (mixed(right ^ key) & mask)
        return (left << self._half_bits) | right


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each value: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
