"""Batches for the trainer: worker processes read and pack rows ahead of time, in an order that no worker decides.

What a worker is asked for is one step's rows of this data rank; what it sends back is one tensor per step, whatever
the number of micro batches: every tensor sent costs a file handle, and there are 1,024 of these.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from internlm.config.batch_texts import parse_batches
from internlm.config.schema import Config, DataConfig
from internlm.data.formats import Int64s, SampleFile
from internlm.data.mixture import MixtureOrder
from internlm.data.packing import Packing, PackOptions, Row, WholeSamples
from internlm.data.rows import ReferenceSums, TrainRows
from internlm.data.sampler import BatchSizes, EpochOrder, Order, Span, place_after, spans
from internlm.data.sources import open_train, open_valid
from internlm.model.batch import Batch, Segments
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step trains on, on this data rank."""

    index: int  # number of the batch in the run, from 0
    micro_batches: list[Batch]  # empty if skipped
    num_rows: int  # of all data ranks
    end: int  # the place in the order of rows behind this batch
    skipped: bool = False


@dataclass(frozen=True)
class _Rows:
    """Some packed rows on their way from a worker: few tensors, easily pinned."""

    data: Tensor  # int64 [rows, 4, tokens]
    cu_seqlens: Tensor  # int32, those of all rows one after the other
    lengths: tuple[tuple[int, ...], ...]  # of the segments of each row
    num_trained: tuple[int, ...]
    numbers: tuple[int, ...]

    @staticmethod
    def of(rows: Sequence[Row], numbers: Sequence[int]) -> "_Rows":
        data = torch.from_numpy(np.stack([row.data for row in rows]))
        ends = [np.cumsum((0, *row.lengths), dtype=np.int32) for row in rows]
        return _Rows(
            data,
            torch.from_numpy(np.concatenate(ends)),
            tuple(row.lengths for row in rows),
            tuple(row.num_trained for row in rows),
            tuple(numbers),
        )

    def pin_memory(self) -> "_Rows":
        return replace(self, data=self.data.pin_memory(), cu_seqlens=self.cu_seqlens.pin_memory())

    def batches(self, reference: ReferenceSums | None = None) -> list[Batch]:
        cu_seqlens = self.cu_seqlens.split([len(lengths) + 1 for lengths in self.lengths])
        return [
            Batch(
                *(tokens, labels, positions, Segments(ends, lengths), type_ids, trained),
                reference=None if reference is None else reference.of(number),
            )
            for (tokens, labels, positions, type_ids), ends, lengths, trained, number in zip(
                self.data.unbind(0), cu_seqlens, self.lengths, self.num_trained, self.numbers, strict=True
            )
        ]


class _Reader(Dataset):
    """In the workers: row numbers in, `_Rows` out, or a user's mistake: an exception would arrive as a traceback."""

    def __init__(self, rows: TrainRows | WholeSamples) -> None:
        self.rows = rows

    def __getitem__(self, numbers: list[int]) -> _Rows | UserError | None:
        try:
            return _Rows.of([self.rows[number] for number in numbers], numbers) if numbers else None
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"the data can't be read any more: {error}; once it can, the same command goes on")


class _Numbers(Sampler[list[int]]):
    """The row numbers to read, step after step; asked for again whenever the loader is iterated."""

    def __init__(self, loader: "TrainLoader | ValidLoader") -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self.loader.row_numbers()


def _same(value: object) -> object:
    return value


def _start_worker(_: int) -> None:
    """Signals are for the trainer, which saves and then ends its workers; under Slurm every process gets them."""
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """SIGTERM from anybody but the trainer is not for this process."""
    trainer = multiprocessing.parent_process()
    while trainer is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(0)


def _torch_loader(loader: "TrainLoader | ValidLoader", rows: TrainRows | WholeSamples, num_workers: int) -> DataLoader:
    with _any_worker_count():
        return DataLoader(
            _Reader(rows),
            batch_size=None,
            sampler=_Numbers(loader),
            num_workers=num_workers,
            collate_fn=_same,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else a seed is drawn from the default one whenever an iteration starts
            worker_init_fn=_start_worker,
        )


@contextmanager
def _any_worker_count() -> Iterator[None]:
    """Suppresses torch's warning: more workers than cores is the user's choice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total.*")
        yield


def _read(loader: DataLoader) -> Iterator[_Rows | None]:
    """What the workers send. Raises the UserError that one of them met."""
    with _any_worker_count():
        answers = iter(loader)
    for rows in answers:
        if isinstance(rows, UserError):
            raise rows
        yield rows


def order_of(data: DataConfig, rows: TrainRows, sizes: BatchSizes) -> Order:
    """The line of rows. Raises UserError for fewer of them than a batch takes, or a mixture of other sources."""
    if data.mixture:
        return MixtureOrder(rows.by_source(), data.mixture, data.seed)
    if len(rows) < sizes.full:
        raise UserError(
            f"data: {len(rows)} packed rows, but one batch takes data.micro_num = {sizes.micro_num} x "
            f"{sizes.dp_size} data ranks = {sizes.full} rows. Give more data, or lower micro_num, seq_len or micro_bsz."
        )
    return EpochOrder(len(rows), data.seed)


class TrainLoader:
    """The batches of a run up to `total_steps`, as one data rank reads them."""

    def __init__(self, config: Config, dp_rank: int, dp_size: int) -> None:
        data = config.data
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.total_steps = data.total_steps
        self.sizes = BatchSizes(data.micro_num, dp_size, data.rampup_batch_size)
        self.skipped = parse_batches(data.skip_batches)
        rows = self.rows = TrainRows(open_train(data, config.model.vocab_size), pack_options(config))
        logger.info("training data: %s", rows)
        self.type_names = rows.type_names
        self.num_rows = len(rows)
        self.reference: ReferenceSums | None = None  # of dpo.reference = once
        self.order = order_of(data, rows, self.sizes)
        self._loader = _torch_loader(self, rows, data.num_worker)
        self.seek(0)

    def seek(self, batch: int, place: int | None = None) -> None:
        """The next iteration begins with `batch`, behind `place` rows of the order.

        None: as many as this run's own batches before that one take, which were perhaps made otherwise.
        """
        self.next_batch = batch
        self.place = place_after(self.order, self.sizes, batch) if place is None else place
        if batch:
            logger.info("batch %d is next, behind %d rows (%d an epoch)", batch, self.place, self.num_rows)

    def rows_to_read(self) -> Int64s:
        """The numbers of all rows, of any data rank, that the batches from the next one on are made of, sorted."""
        read = (self.order.rows(first, size) for index, first, size in self._to_come() if not self._skips(index))
        return np.unique(np.concatenate([np.empty(0, np.int64), *read]))

    def _skips(self, index: int) -> bool:
        return any(index in span for span in self.skipped)

    def _to_come(self) -> Iterator[Span]:
        return spans(self.order, self.sizes, range(self.next_batch, self.total_steps), self.place)

    def row_numbers(self) -> Iterator[list[int]]:
        """The rows of this rank in each batch; none for a skipped one, which is counted but not read."""
        for index, first, size in self._to_come():
            yield [] if self._skips(index) else self.order.rows(first, size)[self.dp_rank :: self.dp_size].tolist()

    def __iter__(self) -> Iterator[StepBatch]:
        """Raises UserError for data that can't be read or does not fit the model."""
        for (index, first, size), rows in zip(self._to_come(), _read(self._loader), strict=True):
            batches = [] if rows is None else rows.batches(self.reference)
            self.next_batch, self.place = index + 1, first + size
            yield StepBatch(index, batches, size, self.place, skipped=rows is None)


class ValidLoader:
    """One validation set, again from its start each time it is iterated; every sample is read exactly once.

    Rows are dealt to the data ranks in turn; where they don't come out even, the last ranks get a row on which nothing
    is counted, so that all ranks do the same number of forward passes.
    """

    def __init__(self, name: str, files: list[SampleFile], options: PackOptions, dp_rank: int, dp_size: int) -> None:
        self.name = name
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.rows = WholeSamples(files, options)
        self.of_pairs = self.rows.of_pairs
        self.reference: ReferenceSums | None = None  # of dpo.reference = once
        logger.info("validation set %s: %d samples in %d rows", name, self.rows.num_samples, len(self.rows))
        self._loader = _torch_loader(self, self.rows, num_workers=0)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.dp_size)

    def rows_to_read(self) -> Int64s:
        return np.arange(len(self.rows))

    def row_numbers(self) -> Iterator[list[int]]:
        for index in range(len(self)):
            yield [index * self.dp_size + self.dp_rank]

    def __iter__(self) -> Iterator[Batch]:
        for rows in _read(self._loader):
            assert rows is not None  # every rank has a row in every batch
            yield from rows.batches(self.reference)


def read_row(rows: TrainRows | WholeSamples, number: int) -> Batch:
    """Row `number`, read in this process. Raises UserError as the loaders do."""
    return _Rows.of([rows[number]], [number]).batches()[0]


def pack_options(config: Config) -> PackOptions:
    """How the rows of a run are made."""
    data = config.data
    by_type: dict[str, Packing] = {"chat": "fit", "preference": "pairs"}
    packing = data.packing or by_type.get(data.type, "cut")
    row_length = data.seq_len * data.micro_bsz
    return PackOptions(data.seq_len, row_length, config.model.vocab_size, data.pack_sample_into_one, packing)


def build_train_loader(config: Config, dp_rank: int, dp_size: int) -> TrainLoader:
    """The training batches of data rank `dp_rank` of `dp_size`; they begin with the first, or where `seek` says.

    Raises UserError for bad files, `mixture`, `rampup_batch_size` or `skip_batches`, and for too few rows for a batch.
    """
    return TrainLoader(config, dp_rank, dp_size)


def build_valid_loaders(config: Config, dp_rank: int, dp_size: int) -> dict[str, ValidLoader]:
    """The validation sets by name, empty without `data.valid_folder`. One batch is micro_bsz * seq_len tokens."""
    sets = open_valid(config.data, config.model.vocab_size)
    return {name: ValidLoader(name, files, pack_options(config), dp_rank, dp_size) for name, files in sets.items()}
