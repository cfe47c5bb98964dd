"""The loader: what ranks read together, resumption anywhere, worker counts, and errors that stay readable."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from internlm.data.loader import StepBatch, build_train_loader, build_valid_loaders
from internlm.model.batch import Batch
from internlm.utils.errors import UserError
from tests.data.helpers import make_config, random_samples, write_bin, write_megatron


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(["en/a.bin", "en/b.bin", "cn/c.bin"]):
        write_bin(folder / name, random_samples(60, 40, seed))
    return folder


def fingerprint(batch: Batch) -> tuple:
    assert batch.type_ids is not None
    tensors = (batch.tokens, batch.labels, batch.positions, batch.segments.cu_seqlens, batch.type_ids)
    return (*(tuple(tensor.tolist()) for tensor in tensors), batch.segments.lengths, batch.num_trained)


def read(batches: list[StepBatch]) -> list[tuple]:
    return [(b.index, b.num_rows, b.skipped, [fingerprint(m) for m in b.micro_batches]) for b in batches]


def run(folder: Path, rank: int = 0, size: int = 1, start: int = 0, **data: object) -> list[tuple]:
    loader = build_train_loader(make_config(train_folder=str(folder), **data), rank, size)
    loader.seek(start)
    return read(list(loader))


def test_batches_are_as_the_model_takes_them(folder: Path) -> None:
    batches = list(build_train_loader(make_config(train_folder=str(folder)), 0, 1))
    assert [batch.index for batch in batches] == list(range(10))
    for micro in (micro for batch in batches for micro in batch.micro_batches):
        for tensor in (micro.tokens, micro.labels, micro.positions, micro.type_ids):
            assert tensor is not None and tensor.dtype == torch.int64 and tensor.shape == (32,)
        assert micro.segments.cu_seqlens.dtype == torch.int32
        assert micro.segments.cu_seqlens.tolist() == np.cumsum((0, *micro.segments.lengths)).tolist()
        assert micro.num_trained == int((micro.labels != -100).sum())
        assert micro.segments.max_length <= 16 and micro.tokens.min() >= 0
        assert micro.type_ids is not None and micro.type_ids.unique().numel() == 1
    assert {int(micro.type_ids[0]) for batch in batches for micro in batch.micro_batches} == {0, 1}  # type: ignore


MIXTURE = {"en": 3.0, "cn": 1.0}


@pytest.mark.parametrize("data", [{}, {"mixture": MIXTURE}, {"rampup_batch_size": "4 4 2", "total_steps": 5}])
def test_ranks_read_one_order_together(folder: Path, data: dict) -> None:
    steps = {"total_steps": 12, **data}
    alone = run(folder, micro_num=8, **steps)
    for size in (2, 4):
        ramp = {"rampup_batch_size": f"{4 // size} {4 // size} 2"} if "rampup_batch_size" in data else {}
        ranks = [run(folder, rank, size, micro_num=8 // size, **{**steps, **ramp}) for rank in range(size)]
        for step, whole in enumerate(alone):
            parts = [rank[step] for rank in ranks]
            assert {part[:2] for part in parts} == {whole[:2]}
            assert sorted(row for part in parts for row in part[3]) == sorted(whole[3])


@pytest.mark.parametrize("data", [{}, {"mixture": MIXTURE}, {"rampup_batch_size": "1 1 7", "skip_batches": "2,20-22"}])
def test_resume_at_every_batch(folder: Path, data: dict) -> None:
    steps = {"micro_num": 3, "total_steps": 60, **data}  # several epochs of about 35 rows on 2 ranks
    whole = run(folder, 1, 2, **steps)
    assert [batch[0] for batch in whole] == list(range(60))
    loader = build_train_loader(make_config(train_folder=str(folder), **steps), 1, 2)
    for start in range(61):
        loader.seek(start)
        assert read(list(loader)) == whole[start:]
    for start in (1, 17, 41, 60):
        assert run(folder, 1, 2, start, **steps) == whole[start:]


@pytest.mark.parametrize("mixture", [{}, MIXTURE])
def test_no_row_is_repeated_or_missed_when_the_batch_changes(folder: Path, mixture: dict) -> None:
    """One after the other: other ranks, accumulation and ramp-up; across epochs, which drop what is left of them."""
    runs: list[tuple[int, int, dict]] = [  # (data ranks, until this batch, keys)
        (2, 5, {"micro_num": 5}),
        (1, 9, {"micro_num": 1}),
        (4, 17, {"micro_num": 2, "rampup_batch_size": "1 1 12"}),
        (3, 20, {"micro_num": 2, "skip_batches": "18"}),
    ]
    batch, place, read, sizes = 0, 0, [], []
    for ranks, stop, keys in runs:
        config = make_config(train_folder=str(folder), total_steps=stop, mixture=mixture, **keys)
        loaders = [build_train_loader(config, rank, ranks) for rank in range(ranks)]
        for loader in loaders:
            loader.seek(batch, place)
        numbers = [list(loader.row_numbers()) for loader in loaders]
        batches = [list(loader) for loader in loaders]
        read += [sorted(row for of_rank in step for row in of_rank) for step in zip(*numbers, strict=True)]
        sizes += [one.num_rows for one in batches[0]]
        (place,) = {of_rank[-1].end for of_rank in batches}
        batch = stop
    num_rows = loaders[0].num_rows
    assert sizes == [10] * 5 + [1] * 4 + [4] * 3 + [8] * 5 + [6] * 3 and num_rows == 113
    line = np.random.RandomState(1024)
    epochs = [line.permutation(num_rows).tolist() for _ in range(2)]
    if mixture:
        epochs = [loaders[0].order.rows(0, sum(sizes)).tolist()]
    expected: list[list[int]] = []
    for size in sizes:
        if len(epochs[0]) < size:
            epochs.pop(0)
        expected.append(sorted(epochs[0][:size]))
        epochs[0] = epochs[0][size:]
    expected[18] = []
    assert read == expected


def test_every_worker_count_reads_the_same_and_resumes(folder: Path) -> None:
    steps = {"micro_num": 3, "total_steps": 25, "skip_batches": "4", "rampup_batch_size": "1 1 3"}
    whole = run(folder, num_worker=0, **steps)
    for workers in (2, 4):
        loader = build_train_loader(make_config(train_folder=str(folder), num_worker=workers, **steps), 0, 1)
        loader.seek(7)
        found = []
        for batch in loader:
            found.append(batch)
            if batch.index == 11:
                break  # the workers have read further by now
        found += list(loader)  # goes on behind the last batch that was handed out
        assert read(found) == whole[7:]
        loader.seek(3)
        assert read(list(loader)) == whole[3:]


def test_skipped_batches_are_counted_but_not_read(folder: Path) -> None:
    whole, some = run(folder), run(folder, skip_batches="0,3-4")
    for before, after in zip(whole, some, strict=True):
        assert after == ((*before[:2], True, []) if before[0] in (0, 3, 4) else before)


def test_dummy_and_synthetic_need_no_files() -> None:
    dummy = build_train_loader(make_config(total_steps=2), 0, 1)
    assert dummy.type_names == ["en", "cn", "code"]
    assert len(list(dummy)) == 2
    whole = list(build_train_loader(make_config(type="synthetic", total_steps=3, valid_folder="x"), 0, 1))
    assert whole[0].micro_batches[0].segments.lengths == (16, 16)
    assert whole[0].micro_batches[0].num_trained == 30
    valid = build_valid_loaders(make_config(type="synthetic", valid_folder="x"), 0, 1)
    assert [len(loader) for loader in valid.values()] == [32]


def test_megatron_folder(tmp_path: Path) -> None:
    write_megatron(tmp_path / "wiki/a", [[list(range(1, 41))], [list(range(30))]] * 3)
    config = make_config(type="megatron", train_folder=str(tmp_path), valid_folder=str(tmp_path), total_steps=2)
    loader = build_train_loader(config, 0, 1)
    assert loader.type_names == ["wiki"]
    assert len(list(loader)) == 2
    assert sum(batch.num_trained for batch in build_valid_loaders(config, 0, 1)["wiki"]) == 6 * 15


@pytest.mark.parametrize("workers", [0, 2])
def test_users_mistakes_come_without_a_worker_traceback(tmp_path: Path, workers: int) -> None:
    write_bin(tmp_path / "en/a.bin", [[5] * 40 + [99]] * 10)
    config = make_config(vocab_size=50, train_folder=str(tmp_path), num_worker=workers)
    with pytest.raises(UserError) as caught:
        list(build_train_loader(config, 0, 1))
    assert "token id 99" in str(caught.value) and "Traceback" not in str(caught.value)


def test_too_little_data_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"packed rows, but one batch takes data\.micro_num = 64 x 4"):
        build_train_loader(make_config(train_folder=str(folder), micro_num=64), 0, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_validation_reads_every_sample_once_on_any_layout(tmp_path: Path, size: int) -> None:
    samples = [[i + 1] * (50 + 3 * i) for i in range(23)]
    write_bin(tmp_path / "en/a.bin", samples)
    config = make_config(valid_folder=str(tmp_path), seq_len=64, micro_bsz=2)
    ranks = [build_valid_loaders(config, rank, size)["en"] for rank in range(size)]
    for _ in range(2):  # from its start each time
        batches = [list(loader) for loader in ranks]
        assert len({len(of_rank) for of_rank in batches}) == 1 and len(batches[0]) == len(ranks[0])
        rows = [batch for of_rank in batches for batch in of_rank]
        tokens = torch.cat([row.tokens for row in rows])
        counts = torch.bincount(tokens, minlength=24)[1:].tolist()
        assert counts == [min(len(sample), 64) for sample in samples]
        trained = sum(row.num_trained for row in rows)
        assert trained == sum(min(len(sample), 64) - 1 for sample in samples)
        assert trained == sum(int((row.labels != -100).sum()) for row in rows)


def test_no_validation_without_a_folder() -> None:
    assert build_valid_loaders(make_config(), 0, 1) == {}


def test_many_micro_batches_need_few_file_handles() -> None:
    """A tensor from a worker costs a handle; with one per field, 64 rows x 5 fields x 4 steps exceed 1,024."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = len(os.listdir("/dev/fd"))  # of the tests before, in this process
    resource.setrlimit(resource.RLIMIT_NOFILE, (others + 200, limits[1]))
    try:
        config = make_config(type="synthetic", micro_num=64, total_steps=8, num_worker=2)
        batches = list(build_train_loader(config, 0, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len({id(micro) for batch in batches for micro in batch.micro_batches}) == 8 * 64


def test_step_batches_are_plain_data() -> None:
    assert [field.name for field in dataclasses.fields(StepBatch)] == [
        *("index", "micro_batches", "num_rows", "end", "skipped")
    ]
