"""Rows of several sources in fixed shares: every block of 10,000 rows holds the same number from each source.

Inside a block the sources are shuffled by (seed, block); a source's own rows are shuffled anew each time it has been
read through, by (seed, source, epoch). So the n-th row of a run is found directly, without reading the ones before.
"""

from collections.abc import Mapping

import numpy as np

from internlm.data.formats import Int64s
from internlm.utils.errors import UserError

BLOCK = 10_000  # rows; a share is exact to 1/10,000


def block_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """Rows of each source in a block, for weights above 0: largest remainders, and at least one row each."""
    total = sum(weights.values())
    exact = {name: weight / total * BLOCK for name, weight in weights.items()}
    counts = {name: max(int(share), 1) for name, share in exact.items()}
    while (left := BLOCK - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        furthest = max(sorted(exact), key=lambda name: (counts[name] + step > 0, step * (exact[name] - counts[name])))
        counts[furthest] += step
    return counts


class MixtureOrder:
    """Rows of sources with weights.

    `rows` are the global row numbers of every source. Raises UserError when `weights` does not fit the sources.
    """

    def __init__(self, rows: Mapping[str, Int64s], weights: Mapping[str, float], seed: int) -> None:
        _check(rows, weights)
        self.names = sorted(name for name, weight in weights.items() if weight > 0)
        self.sources = [rows[name] for name in self.names]
        self.seed = seed % 2**32
        counts = block_counts({name: weights[name] for name in self.names})
        self.counts = np.array([counts[name] for name in self.names])
        self._orders: dict[int, tuple[int, Int64s]] = {}  # source -> its newest epoch and that epoch's rows
        self._block: tuple[int, Int64s, Int64s] = (-1, self.counts, self.counts)

    def _block_places(self, block: int) -> tuple[Int64s, Int64s]:
        """Of each row of a block: its source, and how many rows of that source precede it in the block."""
        if self._block[0] != block:
            sources = np.repeat(np.arange(len(self.counts)), self.counts)
            np.random.Generator(np.random.PCG64([self.seed, block])).shuffle(sources)
            ranks = np.empty(BLOCK, np.int64)
            for source, count in enumerate(self.counts):
                ranks[sources == source] = np.arange(count)
            self._block = (block, sources, ranks)
        return self._block[1], self._block[2]

    def _source_row(self, source: int, number: int) -> int:
        """The `number`-th row that the run reads from `source`, as a global row number."""
        epoch, place = divmod(number, len(self.sources[source]))
        if self._orders.get(source, (-1,))[0] != epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, source, epoch]))
            self._orders[source] = (epoch, random.permutation(self.sources[source]))
        return int(self._orders[source][1][place])

    def row(self, number: int) -> int:
        """The global row number of the run's `number`-th row."""
        block, place = divmod(number, BLOCK)
        sources, ranks = self._block_places(block)
        source = int(sources[place])
        return self._source_row(source, block * int(self.counts[source]) + int(ranks[place]))

    def begin(self, place: int, size: int) -> int:
        return place

    def rows(self, first: int, size: int) -> Int64s:
        return np.array([self.row(first + i) for i in range(size)], np.int64)


def _check(rows: Mapping[str, Int64s], weights: Mapping[str, float]) -> None:
    filled = sorted(name for name, of_source in rows.items() if len(of_source))
    unknown = sorted(name for name, weight in weights.items() if weight > 0 and name not in filled)
    unnamed = sorted(set(filled) - set(weights))
    if unknown:
        raise UserError(f"data.mixture: {', '.join(unknown)} has no rows; sources with data: {', '.join(filled)}.")
    if unnamed:
        raise UserError(f"data.mixture does not name {', '.join(unnamed)}; give a weight (0 leaves a source out).")
    if not any(weight > 0 for weight in weights.values()):
        raise UserError("data.mixture: all weights are 0; give at least one source a weight above 0.")
