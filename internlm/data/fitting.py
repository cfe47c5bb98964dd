"""Training rows of whole samples: no sample is cut between two rows, what is left of a row is padding.

`FittedFile` fills rows as tightly as it can; `UnpackedFile` is the 2023 framework's form without packing.
"""

from bisect import bisect_left, insort
from dataclasses import replace

import numpy as np

from internlm.data.formats import Int64s, SampleFile
from internlm.data.packing import SHUFFLE_SEED, PackOptions, Row, whole_row


def best_fit(lengths: Int64s, size: int) -> list[list[int]]:
    """Samples to rows of `size` tokens: the longest first, each into the fullest row that has room.

    Each entry lists the samples of a row; every length is at most `size`. Time grows with samples times log(size).
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens -> rows that have as many
    spaces: list[int] = []  # the keys, sorted
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            space, row = size, len(rows)
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        rows[row].append(sample)
        left = space - length
        if left not in with_space:
            with_space[left] = []
            insort(spaces, left)
        with_space[left].append(row)
    return rows


class WholeRows:
    """The rows of one file, as lists of its samples."""

    def __init__(self, file: SampleFile, type_id: int, options: PackOptions) -> None:
        self.file, self.type_id, self.options = file, type_id, options
        self.num_tokens = int(file.lengths.sum())
        order = np.arange(len(file))
        np.random.RandomState(SHUFFLE_SEED).shuffle(order)
        self.rows = self._rows(order)

    def _rows(self, order: Int64s) -> list[Int64s]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return whole_row(((self.file, int(sample)) for sample in self.rows[index]), self.type_id, self.options)


class FittedFile(WholeRows):
    """As many whole samples to a row as fit, each a segment of its own."""

    def _rows(self, order: Int64s) -> list[Int64s]:
        lengths = np.minimum(self.file.lengths[order], self.options.seq_len)
        return [order[row] for row in best_fit(lengths, self.options.row_length)]


class UnpackedFile(WholeRows):
    """micro_bsz samples to a row, each cut to seq_len; as many rows as packing would have made, as in 2023."""

    def _rows(self, order: Int64s) -> list[Int64s]:
        samples = self.options.row_length // self.options.seq_len
        count = min(self.num_tokens // self.options.row_length, len(order) // samples)
        return list(order[: count * samples].reshape(count, samples))


class PairedFile(WholeRows):
    """Whole pairs of samples that follow each other; `num_trained` counts pairs, not tokens."""

    def _rows(self, order: Int64s) -> list[Int64s]:
        pairs = order[order % 2 == 0]  # by their first samples
        lengths = self.file.lengths[pairs] + self.file.lengths[pairs + 1]
        return [
            np.stack((pairs[row], pairs[row] + 1), axis=1).flatten()
            for row in best_fit(lengths, self.options.row_length)
        ]

    def __getitem__(self, index: int) -> Row:
        return replace(super().__getitem__(index), num_trained=len(self.rows[index]) // 2)
