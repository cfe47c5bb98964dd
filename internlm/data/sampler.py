"""The order of rows as a pure function of the seed: no state to save, no difference between layouts.

All rows that a run will ever read stand in one line, and a place in it is a number. A batch takes the next rows of the
line, however many it is to have; data rank r of n takes every n-th of them, beginning with the r-th. So two layouts
with the same micro_num * data ranks train on the same rows at every step, and a run goes on at any place, with batches
of any size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from internlm.data.formats import Int64s
from internlm.utils.errors import UserError


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
        if self.rampup.strip():
            _ = self._ramp  # refuses a bad text now

    @cached_property
    def _ramp(self) -> Int64s:
        """Rows per rank of the batches before the size is constant, [batches]."""
        if not self.rampup.strip():
            return np.empty(0, np.int64)
        try:
            start, increment, every = (int(word) for word in self.rampup.split())
        except ValueError:
            start = increment = every = 0
        if min(start, increment, every) < 1:
            raise UserError(
                f'data.rampup_batch_size = "{self.rampup}": expected three positive integers "START INCR EVERY", '
                'such as "2 2 100": 2 micro batches, 2 more every 100 batches, up to data.micro_num.'
            )
        return np.arange(min(start, self.micro_num), self.micro_num, increment, dtype=np.int64).repeat(every)

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


@dataclass(frozen=True)
class SkippedBatches:
    """The batches named by `skip_batches`, as "3,10-12" (both ends included, ascending)."""

    spans: Sequence[tuple[int, int]]

    @staticmethod
    def parse(text: str) -> "SkippedBatches":
        """Raises UserError for anything but ascending numbers and spans that don't overlap."""
        spans: list[tuple[int, int]] = []
        for item in text.split(",") if text.strip() else []:
            first, dash, last = item.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise UserError(f'data.skip_batches = "{text}": "{item}" is neither a number nor a span like 10-12.')
            span = (int(first), int(last) if dash else int(first))
            if span[1] < span[0] or (spans and span[0] <= spans[-1][1]):
                raise UserError(f'data.skip_batches = "{text}": "{item}" does not ascend; sort the items.')
            spans.append(span)
        return SkippedBatches(spans)

    def __contains__(self, index: int) -> bool:
        return any(first <= index <= last for first, last in self.spans)
