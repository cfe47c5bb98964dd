"""The order of rows as a pure function of the seed: no state to save, no difference between layouts.

All rows that a run will ever read stand in one line, and a place in it is a number. A batch takes the next rows of the
line, however many it is to have; data rank r of n takes every n-th of them, beginning with the r-th. So two layouts
with the same micro_num * data ranks train on the same rows at every step, and a run goes on at any place, with batches
of any size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from internlm.config.batch_texts import parse_ramp
from internlm.data.formats import Int64s


class Order(Protocol):
    """The line of rows."""

    def begin(self, place: int, size: int) -> int:
        """Where a batch of `size` rows begins, when those before it end at `place`."""
        ...

    def rows(self, first: int, size: int) -> Int64s:
        """The rows of a batch that begins at `first`, [size]."""
        ...


@dataclass(frozen=True)
class BatchSizes:
    """Rows per batch: micro_num on each data rank, or fewer while `rampup_batch_size` "START INCR EVERY" holds.

    Batch k then has min(START + (k // EVERY) * INCR, micro_num) rows per rank. Raises UserError for a bad text.
    """

    micro_num: int
    dp_size: int
    rampup: str = ""

    def __post_init__(self) -> None:
        _ = self._ramp  # refuses a bad text now

    @cached_property
    def _ramp(self) -> Int64s:
        """Rows per rank of the batches before the size is constant, [batches]."""
        ramp = parse_ramp(self.rampup)
        if ramp is None:
            return np.empty(0, np.int64)
        return np.arange(ramp.start, self.micro_num, ramp.increment, dtype=np.int64).repeat(ramp.every)

    @property
    def full(self) -> int:
        """Rows of the world in a batch after the ramp-up."""
        return self.micro_num * self.dp_size

    def size(self, index: int) -> int:
        """Rows of the world in batch `index`."""
        return int(self._ramp[index]) * self.dp_size if index < len(self._ramp) else self.full


class EpochOrder:
    """Every row once per epoch, in the 2023 order: one RandomState(seed) shuffles 0..rows-1 anew for each epoch.

    An epoch ends when what is left of it is smaller than the next batch; that rest is dropped.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self._epoch = -1
        self._random = np.random.RandomState(seed)
        self._rows: Int64s = np.empty(0, np.int64)

    def begin(self, place: int, size: int) -> int:
        epoch, used = divmod(place, self.num_rows)
        return place if used + size <= self.num_rows else (epoch + 1) * self.num_rows

    def rows(self, first: int, size: int) -> Int64s:
        epoch, used = divmod(first, self.num_rows)
        return self._epoch_rows(epoch)[used : used + size]

    def _epoch_rows(self, epoch: int) -> Int64s:
        """All rows in the order of `epoch`; cheap for the same or the next epoch, else shuffled from the first on."""
        if epoch < self._epoch:
            self._epoch, self._random = -1, np.random.RandomState(self.seed)
        while self._epoch < epoch:
            self._rows = np.arange(self.num_rows)
            self._random.shuffle(self._rows)
            self._epoch += 1
        return self._rows


class Span(NamedTuple):
    """What a batch takes of the line."""

    batch: int
    first: int  # place
    size: int  # rows of the world


def spans(order: Order, sizes: BatchSizes, batches: range, place: int) -> Iterator[Span]:
    """Some batches, one after the other, behind `place`."""
    for batch in batches:
        size = sizes.size(batch)
        first = order.begin(place, size)
        place = first + size
        yield Span(batch, first, size)


def place_after(order: Order, sizes: BatchSizes, batch: int) -> int:
    """The place behind the first `batch` batches of a run."""
    return max((first + size for _, first, size in spans(order, sizes, range(batch), 0)), default=0)
