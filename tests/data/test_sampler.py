"""The order of rows against a re-telling of the 2023 sampler; mixtures against their shares."""

from collections import Counter

import numpy as np
import pytest

from internlm.config.batch_texts import parse_batches
from internlm.data.mixture import BLOCK, MixtureOrder, block_counts
from internlm.data.sampler import BatchSizes, EpochOrder, Order, place_after
from internlm.utils.errors import UserError


def sampler_2023(num_rows: int, micro_num: int, dp_size: int, seed: int, num_batches: int, ramp: str = "") -> list:
    """[batch][rank] -> rows, as the reference describes the loop of every rank."""
    start, increment, every = (int(word) for word in ramp.split()) if ramp else (micro_num, 1, 1)
    random, count = np.random.RandomState(seed), 0
    batches: list = []
    while len(batches) < num_batches:
        indices = np.arange(num_rows)
        random.shuffle(indices)
        ramped = 0  # rows per rank of the ramp-up, which in these cases lies in the first epoch
        if not batches and ramp:
            for step in range((micro_num - start) // increment):
                ramped += (start + step * increment) * every
        whole = micro_num * dp_size
        indices = indices[: (num_rows - ramped * dp_size) // whole * whole + ramped * dp_size]
        ranks = [indices[rank::dp_size] for rank in range(dp_size)]
        used = 0
        while used < len(ranks[0]):
            size = min(start + count // every * increment, micro_num)
            batches.append([rank[used : used + size].tolist() for rank in ranks])
            used, count = used + size, count + 1
    return batches[:num_batches]


def batch(order: Order, sizes: BatchSizes, index: int) -> np.ndarray:
    """The rows of batch `index` of a run, on all ranks."""
    return order.rows(order.begin(place_after(order, sizes, index), sizes.size(index)), sizes.size(index))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize(("micro_num", "ramp"), [(4, ""), (4, "2 1 2"), (4, "1 1 3"), (6, "2 2 1")])
def test_order_is_that_of_2023(dp_size: int, micro_num: int, ramp: str) -> None:
    order, sizes = EpochOrder(101, seed=5), BatchSizes(micro_num, dp_size, ramp)
    for index, ranks in enumerate(sampler_2023(101, micro_num, dp_size, 5, 40, ramp)):
        assert [batch(order, sizes, index)[rank::dp_size].tolist() for rank in range(dp_size)] == ranks


def test_any_batch_by_its_index_alone() -> None:
    sizes = BatchSizes(4, 2, "1 1 5")
    forward = EpochOrder(50, seed=1)
    expected = [batch(forward, sizes, i).tolist() for i in range(60)]
    for index in np.random.default_rng(0).permutation(60).tolist():
        assert batch(EpochOrder(50, seed=1), sizes, index).tolist() == expected[index]
        assert batch(forward, sizes, index).tolist() == expected[index]  # also backwards


def test_every_epoch_has_each_row_at_most_once_and_its_own_order() -> None:
    order, sizes = EpochOrder(103, seed=1), BatchSizes(5, 2)
    epochs = [[row for index in range(e * 10, e * 10 + 10) for row in batch(order, sizes, index)] for e in range(3)]
    assert all(len(set(rows)) == len(rows) == 100 for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.begin(place_after(order, sizes, 10), 10) == 103 and place_after(order, sizes, 29) == 2 * 103 + 90


def test_same_global_batch_on_any_number_of_ranks() -> None:
    sizes = [BatchSizes(8 // dp, dp) for dp in (1, 2, 4, 8)]
    for index in (0, 1, 77, 124, 125, 600):
        assert len({tuple(batch(EpochOrder(1000, seed=3), size, index)) for size in sizes}) == 1


def test_ramp_up_across_epochs() -> None:
    sizes = BatchSizes(5, 1, "1 2 3")
    assert [sizes.size(i) for i in range(8)] == [1, 1, 1, 3, 3, 3, 5, 5]
    order = EpochOrder(7, seed=0)  # epochs: 1 1 1 3, 3 3, 5, 5
    assert [place_after(order, sizes, i) for i in range(9)] == [0, 1, 2, 3, 6, 10, 13, 19, 26]


@pytest.mark.parametrize("text", ["2 2", "a b c", "0 1 1", "2 0 5", "2 2 -1"])
def test_bad_ramp_up(text: str) -> None:
    with pytest.raises(UserError, match=r"data\.rampup_batch_size"):
        BatchSizes(4, 1, text)


def test_skip_batches() -> None:
    assert [i for span in parse_batches("3, 10-12,20") for i in span] == [3, 10, 11, 12, 20]
    assert not parse_batches("")
    for bad in ("x", "3-", "-3", "5,4", "4,4", "1-5,5", "7-6", "1,,2", "1.5"):
        with pytest.raises(UserError, match="skip_batches"):
            parse_batches(bad)


ROWS = {"a": np.arange(0, 300), "b": np.arange(300, 310), "c": np.arange(310, 1000), "empty": np.empty(0, np.int64)}
WEIGHTS = {"a": 6.0, "b": 1.0, "c": 3.0}


def source_of(row: int) -> str:
    return next(name for name, rows in ROWS.items() if row in rows)


def test_mixture_shares_hold_in_every_block() -> None:
    order = MixtureOrder(ROWS, WEIGHTS, seed=7)
    for block in range(2):
        rows = order.rows(block * BLOCK, BLOCK)
        assert Counter(source_of(row) for row in rows) == {"a": 6000, "b": 1000, "c": 3000}


def test_mixture_reads_each_source_epoch_by_epoch() -> None:
    order = MixtureOrder(ROWS, WEIGHTS, seed=7)
    rows = np.concatenate([batch(order, BatchSizes(100, 5), i) for i in range(30)])
    for of_source in (ROWS[name] for name in WEIGHTS):
        read = [row for row in rows if row in of_source]
        for start in range(0, len(read) - len(of_source) + 1, len(of_source)):
            assert sorted(read[start : start + len(of_source)]) == of_source.tolist()
    small = [row for row in rows if 300 <= row < 310]
    assert small[:10] != small[10:20]


def test_mixture_seeks_to_any_batch_on_any_layout() -> None:
    sizes = BatchSizes(6, 1, "2 2 3")
    forward = MixtureOrder(ROWS, WEIGHTS, seed=7)
    expected = [batch(forward, sizes, i).tolist() for i in range(40)]
    for index in np.random.default_rng(0).permutation(40).tolist():
        assert batch(MixtureOrder(ROWS, WEIGHTS, seed=7), sizes, index).tolist() == expected[index]
    assert batch(MixtureOrder(ROWS, WEIGHTS, seed=8), sizes, 0).tolist() != expected[0]
    far, near = (MixtureOrder(ROWS, WEIGHTS, seed=7).rows(10**9 + i, 4 - i).tolist() for i in (0, 3))
    assert far[3:] == near


def test_block_counts() -> None:
    assert block_counts({"a": 1, "b": 1, "c": 1}) == {"a": 3334, "b": 3333, "c": 3333}
    assert block_counts({"a": 1e9, "b": 1e-9}) == {"a": 9999, "b": 1}
    assert block_counts({"a": 0.25, "b": 0.75}) == {"a": 2500, "b": 7500}


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"a": 1.0, "b": 1.0}, "does not name c"),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, "d has no rows"),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "empty": 1.0}, "empty has no rows"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, "all weights are 0"),
    ],
)
def test_bad_mixture(weights: dict[str, float], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        MixtureOrder(ROWS, weights, seed=0)
