"""The order of rows as a pure function of (seed, batch index): no state to save, no difference between layouts.

Batch k is a set of rows for the whole world; data rank r of n takes every n-th of them, beginning with the r-th. So
two layouts with the same micro_num * data ranks train on the same rows at every step, and a run resumes anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from internlm.data.formats import Int64s
from internlm.utils.errors import UserError


class Order(Protocol):
    """Which rows make up batch k of the whole world."""

    def batch(self, index: int) -> Int64s: ...  # [rows of the batch]


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

    @cached_property
    def ramp(self) -> Int64s:
        """Rows of the world in the batches before the size is constant, [batches]."""
        return self._ramp * self.dp_size

    @cached_property
    def _ramp_ends(self) -> Int64s:
        return np.concatenate(([0], self.ramp.cumsum())).astype(np.int64)

    @property
    def full(self) -> int:
        """Rows of the world in a batch after the ramp-up."""
        return self.micro_num * self.dp_size

    def size(self, index: int) -> int:
        """Rows of the world in batch `index`."""
        return int(self.ramp[index]) if index < len(self.ramp) else self.full

    def rows_before(self, index: int) -> int:
        """Rows of the world in all batches before `index`."""
        ramped = min(index, len(self.ramp))
        return int(self._ramp_ends[ramped]) + (index - ramped) * self.full


class EpochOrder:
    """Every row once per epoch, in the 2023 order: one RandomState(seed) shuffles 0..rows-1 anew for each epoch.

    An epoch ends when what is left of it is smaller than the next batch; that rest is dropped.
    Raises UserError when not even one batch fits in.
    """

    def __init__(self, num_rows: int, sizes: BatchSizes, seed: int) -> None:
        self.num_rows = num_rows
        self.sizes = sizes
        self.seed = seed
        if num_rows < sizes.full:
            raise UserError(
                f"data: {num_rows} packed rows, but one batch takes data.micro_num = {sizes.micro_num} x "
                f"{sizes.dp_size} data ranks = {sizes.full} rows. Give more data, or make micro_num, seq_len or "
                "micro_bsz smaller."
            )
        self._epoch = -1
        self._random = np.random.RandomState(seed)
        self._rows: Int64s = np.empty(0, np.int64)

    @cached_property
    def _ramp_places(self) -> list[tuple[int, int]]:
        """(epoch, first row in it) of each batch of the ramp-up and of the first one after it."""
        places, epoch, used = [], 0, 0
        for size in (*self.sizes.ramp.tolist(), self.sizes.full):
            if used + size > self.num_rows:
                epoch, used = epoch + 1, 0
            places.append((epoch, used))
            used += size
        return places

    def place(self, index: int) -> tuple[int, int]:
        """The epoch of batch `index` and where in it the batch begins, in rows."""
        ramped = len(self.sizes.ramp)
        if index <= ramped:
            return self._ramp_places[index]
        epoch, used = self._ramp_places[ramped]
        per_epoch = self.num_rows // self.sizes.full
        here = (self.num_rows - used) // self.sizes.full  # batches left in the epoch in which the ramp-up ended
        after = index - ramped - here
        if after < 0:
            return epoch, used + (index - ramped) * self.sizes.full
        return epoch + 1 + after // per_epoch, after % per_epoch * self.sizes.full

    def epoch_rows(self, epoch: int) -> Int64s:
        """All rows in the order of `epoch`; cheap for the same or the next epoch, else shuffled from the first on."""
        if epoch < self._epoch:
            self._epoch, self._random = -1, np.random.RandomState(self.seed)
        while self._epoch < epoch:
            self._rows = np.arange(self.num_rows)
            self._random.shuffle(self._rows)
            self._epoch += 1
        return self._rows

    def batch(self, index: int) -> Int64s:
        epoch, first = self.place(index)
        return self.epoch_rows(epoch)[first : first + self.sizes.size(index)]


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
