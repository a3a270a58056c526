"""The order in which a region reads its sequences, as a function of one integer.

A region's data cursor is its `position`: how many sequences it has handed out so far. Nothing else is
saved, and reading on from any position gives what an uninterrupted run would have read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xcloud.errors import ConfigError, DataError

__all__ = ["Order"]


class Order:
    """Endless passes over `length` sequences, each pass an independent seeded permutation.

    Position p lies in epoch `p // length`. Within an epoch nothing is skipped or read twice.
    """

    def __init__(self, length: int, seed: int) -> None:
        """
        Args:
            length: number of sequences.
            seed: any integer >= 0; the same length and seed give the same order.
        """
        if length < 1:
            raise DataError(f"cannot order {length} sequences; at least one is needed")
        if seed < 0:
            raise ConfigError(f"data seed must be >= 0, found {seed}")
        self.length = length
        self.seed = seed
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def indices(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """Sequence ids at positions [position, position + count): int64, shape [count]."""
        assert min(position, count) >= 0, (position, count)
        result = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, start = divmod(position + filled, self.length)
            ids = self._epoch(epoch)[start : start + count - filled]
            result[filled : filled + len(ids)] = ids
            filled += len(ids)
        return result

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """The permutation of one epoch. Two are kept, so that reads across a boundary shuffle once."""
        if epoch not in self._epochs:
            self._epochs = {known: ids for known, ids in self._epochs.items() if known == epoch - 1}
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            self._epochs[epoch] = generator.permutation(self.length)
        return self._epochs[epoch]
