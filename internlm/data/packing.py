"""Samples to rows of a fixed number of tokens, by random access: row k is found from cumulative lengths alone.

Training: the samples of one file, in an order shuffled once with a fixed seed, are laid end to end and cut every
`row_length` tokens; the tail is dropped. Validation: whole samples, none cut except to `seq_len`, none dropped.
The rules of labels and segments are those of the 2023 framework.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from internlm.data.formats import Int64s, SampleFile, check_vocabulary
from internlm.model.batch import IGNORE_INDEX

SHUFFLE_SEED = 1024  # of the samples inside a file; fixed in 2023, so that one folder always makes the same rows

Packing = Literal["cut", "fit", "unpacked", "pairs"]  # what happens to a sample at the end of a row: see data.packing


@dataclass(frozen=True)
class Row:
    """One packed row; `data` holds tokens, labels, positions and type ids."""

    data: Int64s  # [4, tokens]
    lengths: tuple[int, ...]  # tokens of each segment
    num_trained: int


@dataclass(frozen=True)
class PackOptions:
    """What the rows of all files of a run have in common."""

    seq_len: int
    row_length: int  # seq_len * micro_bsz
    vocab_size: int
    pack_sample_into_one: bool = False
    packing: Packing = "cut"


class PackedFile:
    """The training rows of one file."""

    def __init__(self, file: SampleFile, type_id: int, options: PackOptions) -> None:
        self.file = file
        self.type_id = type_id
        self.options = options
        self.order = np.arange(len(file))
        np.random.RandomState(SHUFFLE_SEED).shuffle(self.order)
        self.ends = file.lengths[self.order].cumsum()  # [samples], in shuffled order
        self.num_tokens = int(self.ends[-1]) if len(file) else 0

    def __len__(self) -> int:
        return self.num_tokens // self.options.row_length

    def __getitem__(self, index: int) -> Row:
        length = self.options.row_length
        data = np.empty((4, length), np.int64)
        segments: list[int] = []
        filled, start = 0, index * length
        place = int(np.searchsorted(self.ends, start, side="right"))  # the sample that holds token `start`
        while filled < length:
            sample = int(self.order[place])
            first = max(start - int(self.ends[place] - self.file.lengths[sample]), 0)
            filled += self._put(data[:, filled:], sample, first, segments)
            place += 1
        if self.options.pack_sample_into_one:
            windows = length // self.options.seq_len
            data[2] = np.tile(np.arange(self.options.seq_len), windows)
            segments = [self.options.seq_len] * windows
        data[3] = self.type_id
        return _row(data, segments)

    def _put(self, space: Int64s, sample: int, first: int, segments: list[int]) -> int:
        """Lay sample[first:] into `space` [4, room] as far as it fits; appends its segments, returns its tokens."""
        ids, trained = self.file.sample(sample)
        check_vocabulary(ids, self.options.vocab_size, self.file, sample)
        piece = ids[first : first + space.shape[1]]
        count = len(piece)
        space[0, :count] = piece
        targets = np.where(trained, ids, IGNORE_INDEX)[first + 1 : first + 1 + count]
        if self.options.pack_sample_into_one:
            targets = targets[: count - 1]  # a window does not train on what the next row begins with
        space[1, : len(targets)] = targets
        space[1, len(targets) : count] = IGNORE_INDEX
        seq_len = self.options.seq_len
        space[2, :count] = np.arange(count) % seq_len
        segments.extend([seq_len] * (count // seq_len))
        if count % seq_len:
            segments.append(count % seq_len)
        return count


class WholeSamples:
    """The validation rows of some files: samples in order, each cut to `seq_len` and one segment of its own.

    As many whole samples share a row as fit; what is left of the row is an ignored segment, so that every row has the
    same number of tokens. Each sample is in exactly one row, beside the other one of its pair where there are pairs,
    which `num_trained` counts then. (In 2023 each sample was padded to `seq_len`, and up to a batch of samples was
    dropped at the end.)
    """

    def __init__(self, files: list[SampleFile], options: PackOptions) -> None:
        self.files = files
        self.options = options
        self.firsts = np.concatenate(([0], np.cumsum([len(file) for file in files]))).astype(np.int64)
        lengths = np.concatenate([file.lengths for file in files] or [np.empty(0, np.int64)])
        self.ends = np.minimum(lengths, options.seq_len).cumsum()  # [samples of all files]
        self.of_pairs = options.packing == "pairs"
        self.bounds = self._row_bounds(2 if self.of_pairs else 1)  # row k: samples bounds[k] to bounds[k + 1] - 1

    def _row_bounds(self, together: int) -> list[int]:
        """Where rows begin, in samples, so many of which stay `together`."""
        ends = self.ends[together - 1 :: together]
        bounds, used = [0], 0
        while bounds[-1] < len(ends):
            bounds.append(int(np.searchsorted(ends, used + self.options.row_length, side="right")))
            used = int(ends[bounds[-1] - 1])
        return [together * bound for bound in bounds]

    @property
    def num_samples(self) -> int:
        return len(self.ends)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Row:
        """Row `index`; from `len(self)` on, rows on which nothing is counted."""
        samples = self.samples_of(index)
        row = whole_row((self._locate(int(sample)) for sample in samples), 0, self.options)
        return replace(row, num_trained=len(samples) // 2) if self.of_pairs else row

    def samples_of(self, index: int) -> Int64s:
        """The samples of row `index`, numbered through all files."""
        return np.arange(*self.bounds[index : index + 2]) if index < len(self) else np.empty(0, np.int64)

    def _locate(self, sample: int) -> tuple[SampleFile, int]:
        """The file of a sample, and its number there."""
        which = int(np.searchsorted(self.firsts, sample, side="right")) - 1
        return self.files[which], sample - int(self.firsts[which])


def whole_row(samples: Iterable[tuple[SampleFile, int]], type_id: int, options: PackOptions) -> Row:
    """A row of samples that are known to fit, each cut to `seq_len` and a segment of its own.

    What is left is filled with segments on which nothing is trained.
    """
    data = np.zeros((4, options.row_length), np.int64)
    data[1] = IGNORE_INDEX
    segments: list[int] = []
    filled = 0
    for file, index in samples:
        ids, trained = file.sample(index)
        ids, trained = ids[: options.seq_len], trained[: options.seq_len]
        check_vocabulary(ids, options.vocab_size, file, index)
        end = filled + len(ids)
        data[0, filled:end] = ids
        data[1, filled : end - 1] = np.where(trained, ids, IGNORE_INDEX)[1:]
        segments.extend([len(ids)] if len(ids) else [])
        filled = end
    full, rest = divmod(options.row_length - filled, options.seq_len)
    segments.extend([options.seq_len] * full + ([rest] if rest else []))
    data[2] = np.concatenate([np.arange(length) for length in segments])
    data[3] = type_id
    return _row(data, segments)


def _row(data: Int64s, segments: list[int]) -> Row:
    return Row(data, tuple(segments), int((data[1] != IGNORE_INDEX).sum()))
