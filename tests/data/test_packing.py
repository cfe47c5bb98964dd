"""Packed rows against the reference's worked examples and a plain re-telling of its rules."""

from pathlib import Path

import numpy as np
import pytest

from internlm.data.formats import Int64s, MegatronFile, SampleFile, TokenizedFile
from internlm.data.packing import PackedFile, PackOptions, Row, WholeSamples
from internlm.utils.errors import UserError
from tests.data.helpers import random_samples, write_bin, write_megatron


class Listed(SampleFile):
    """Samples from a list."""

    name = "listed"

    def __init__(self, samples: list[list[int]]) -> None:
        self.samples = samples
        self.lengths = np.array([len(sample) for sample in samples], np.int64)

    def tokens(self, index: int) -> Int64s:
        return np.array(self.samples[index], np.int64)


def unshuffled(samples: list[list[int]]) -> Listed:
    """A file whose shuffled order is `samples`."""
    order = list(range(len(samples)))
    np.random.RandomState(1024).shuffle(order)
    placed: list[list[int]] = [[]] * len(samples)
    for place, index in enumerate(order):
        placed[index] = samples[place]
    return Listed(placed)


def options(seq_len: int, row_length: int, one: bool = False, vocab_size: int = 512) -> PackOptions:
    return PackOptions(seq_len, row_length, vocab_size, one)


def told(row: Row) -> tuple[list[int], list[int], list[int], list[int]]:
    cu_seqlens = np.cumsum((0, *row.lengths)).tolist()
    return row.data[0].tolist(), cu_seqlens, row.data[2].tolist(), row.data[1].tolist()


EXAMPLE = [[1, 2], [3, 4], [5, 6, 7], [8, 9, 10, 11, 12, 13]]


def test_reference_example_with_cuts() -> None:
    packed = PackedFile(unshuffled(EXAMPLE), 3, options(3, 5))
    assert len(packed) == 2
    assert told(packed[0]) == ([1, 2, 3, 4, 5], [0, 2, 4, 5], [0, 1, 0, 1, 0], [2, -100, 4, -100, 6])
    assert told(packed[1]) == ([6, 7, 8, 9, 10], [0, 2, 5], [0, 1, 0, 1, 2], [7, -100, 9, 10, 11])
    assert packed[0].data[3].tolist() == [3] * 5
    assert [packed[0].num_trained, packed[1].num_trained] == [3, 4]


def test_sample_longer_than_seq_len_keeps_its_labels() -> None:
    packed = PackedFile(unshuffled([[1, 2, 3, 4, 5, 6, 7, 8]]), 0, options(3, 4))
    assert told(packed[0]) == ([1, 2, 3, 4], [0, 3, 4], [0, 1, 2, 0], [2, 3, 4, 5])
    assert told(packed[1]) == ([5, 6, 7, 8], [0, 3, 4], [0, 1, 2, 0], [6, 7, 8, -100])


def test_windows_of_pack_sample_into_one() -> None:
    packed = PackedFile(unshuffled(EXAMPLE), 0, options(3, 6, one=True))
    assert told(packed[0]) == ([1, 2, 3, 4, 5, 6], [0, 3, 6], [0, 1, 2, 0, 1, 2], [2, -100, 4, -100, 6, -100])
    assert told(packed[1]) == ([7, 8, 9, 10, 11, 12], [0, 3, 6], [0, 1, 2] * 2, [-100, 9, 10, 11, 12, -100])


def brute_force(samples: list[list[int]], seq_len: int, length: int, one: bool) -> list[tuple[list[int], ...]]:
    """The reference's text, token by token."""
    order = list(range(len(samples)))
    np.random.RandomState(1024).shuffle(order)
    stream = [(sample, place) for sample in order for place in range(len(samples[sample]))]
    rows = []
    for k in range(len(stream) // length):
        part = stream[k * length : (k + 1) * length]
        tokens, labels, indexes, cu = [], [], [], [0]
        run = 0  # place inside the piece of one sample in this row
        for i, (sample, place) in enumerate(part):
            tokens.append(abs(samples[sample][place]))
            run = run + 1 if i and part[i - 1][0] == sample else 0
            ends_sample = place == len(samples[sample]) - 1
            ends_row = i == length - 1
            target = -100 if ends_sample or (one and ends_row) else samples[sample][place + 1]
            labels.append(target if target > 0 else -100)
            indexes.append(i % seq_len if one else run % seq_len)
            if i and indexes[-1] == 0:
                cu.append(i)
        rows.append((tokens, [*cu, length], indexes, labels))
    return rows


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize(("seq_len", "length", "longest"), [(4, 8, 5), (4, 4, 30), (7, 21, 3), (1, 5, 9), (16, 16, 60)])
def test_equals_brute_force(one: bool, seq_len: int, length: int, longest: int) -> None:
    for seed in range(4):
        samples = random_samples(40, longest, seed)
        packed = PackedFile(Listed(samples), 0, options(seq_len, length, one))
        expected = brute_force(samples, seq_len, length, one)
        assert len(packed) == len(expected)
        for k in reversed(range(len(packed))):  # random access: not in order
            assert told(packed[k]) == expected[k]
            assert packed[k].num_trained == sum(label != -100 for label in expected[k][3])


def test_too_few_tokens_make_no_row() -> None:
    assert len(PackedFile(Listed([[1, 2], [3]]), 0, options(4, 4))) == 0
    assert len(PackedFile(Listed([]), 0, options(4, 4))) == 0


def test_id_zero_is_trained_in_megatron_data_only(tmp_path: Path) -> None:
    samples = [[1, 0, 2, 0]]
    megatron = MegatronFile(write_megatron(tmp_path / "m", [samples]))
    tokenized = TokenizedFile(write_bin(tmp_path / "t.bin", samples))
    assert PackedFile(megatron, 0, options(4, 4))[0].data[1].tolist() == [0, 2, 0, -100]
    assert PackedFile(tokenized, 0, options(4, 4))[0].data[1].tolist() == [-100, 2, -100, -100]


@pytest.mark.parametrize("wrong", [10, -10, 10**30, -(10**30)])
def test_id_beyond_the_vocabulary_is_named(tmp_path: Path, wrong: int) -> None:
    path = write_bin(tmp_path / "a.bin", [[1, 2, 9, -9], [3, 4, wrong, 5], [6, 7, 8, 9]])
    packed = PackedFile(TokenizedFile(path), 0, options(4, 4, vocab_size=10))
    shown = "10" if abs(wrong) == 10 else "-?9223372036854775"
    with pytest.raises(UserError, match=rf"a\.bin, line 2 \(byte .*token id {shown}.*vocab_size = 10"):
        for k in range(3):
            _ = packed[k]
    with pytest.raises(UserError, match="line 2"):
        _ = WholeSamples([TokenizedFile(path)], options(4, 12, vocab_size=10))[0]


@pytest.mark.parametrize(("seq_len", "length"), [(8, 8), (8, 24)])
def test_validation_rows_hold_every_sample_once(seq_len: int, length: int) -> None:
    files = [random_samples(25, 12, seed) for seed in (1, 2)]
    rows = WholeSamples([Listed(samples) for samples in files], options(seq_len, length))
    found = []
    for row in (rows[k] for k in range(len(rows))):
        assert row.data.shape == (4, length) and sum(row.lengths) == length and max(row.lengths) <= seq_len
        ends = np.cumsum(row.lengths)
        for start, end in zip(ends - row.lengths, ends, strict=True):
            assert row.data[2, start:end].tolist() == list(range(end - start))
            found.append((row.data[0, start:end].tolist(), row.data[1, start:end].tolist()))
    expected = []
    for sample in (sample[:seq_len] for samples in files for sample in samples):
        labels = [label if label > 0 else -100 for label in sample[1:]] + [-100]
        if sample:
            expected.append(([abs(token) for token in sample], labels))
    padding = [pair for pair in found if not any(pair[0])]
    assert all(label == -100 for _, labels in padding for label in labels)
    assert [pair for pair in found if any(pair[0])] == [pair for pair in expected if any(pair[0])]
    used = sum(len(tokens) for tokens, _ in expected)
    assert len(rows) <= -(-used // (length - seq_len + 1)) + 1  # little is wasted


def test_rows_beyond_the_last_count_nothing() -> None:
    rows = WholeSamples([Listed([[1, 2, 3]])], options(4, 8))
    assert told(rows[0]) == ([1, 2, 3, 0, 0, 0, 0, 0], [0, 3, 7, 8], [0, 1, 2, 0, 1, 2, 3, 0], [2, 3] + [-100] * 6)
    assert told(rows[1]) == ([0] * 8, [0, 4, 8], [0, 1, 2, 3] * 2, [-100] * 8)
    assert rows[1].num_trained == 0
