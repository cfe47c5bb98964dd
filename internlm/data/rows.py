"""The training rows of all files under one numbering, and what is known of the samples in them."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from internlm.data.fitting import FittedFile, PairedFile, UnpackedFile, WholeRows
from internlm.data.formats import Int64s
from internlm.data.packing import PackedFile, Packing, PackOptions, Row, WholeSamples
from internlm.data.sources import Sources


class TrainRows:
    """All training rows of a run, numbered through all files."""

    def __init__(self, sources: Sources, options: PackOptions) -> None:
        self.type_names = sources.type_names
        kinds: dict[Packing, type[PackedFile] | type[FittedFile] | type[UnpackedFile] | type[PairedFile]]
        kinds = {"cut": PackedFile, "fit": FittedFile, "unpacked": UnpackedFile, "pairs": PairedFile}
        pack = kinds[options.packing]
        self.files = [
            pack(file, type_id, options) for file, type_id in zip(sources.files, sources.type_ids, strict=True)
        ]
        self.ends = list(accumulate(len(file) for file in self.files))
        self.first_samples = list(accumulate((len(file.file) for file in self.files), initial=0))
        self.row_length = options.row_length

    def __str__(self) -> str:
        num_tokens = sum(file.num_tokens for file in self.files)
        return (
            f"{len(self.files)} files, {self.num_samples} samples, {num_tokens} tokens -> {len(self)} rows of "
            f"{self.row_length} tokens"
        )

    @property
    def num_samples(self) -> int:
        return self.first_samples[-1]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> Row:
        place = bisect_right(self.ends, number)
        return self.files[place][number - (self.ends[place] - len(self.files[place]))]

    def samples_of(self, number: int) -> Int64s:
        """The samples of row `number`, numbered through all files; of rows that hold whole samples."""
        place = bisect_right(self.ends, number)
        file = self.files[place]
        assert isinstance(file, WholeRows)
        return file.rows[number - (self.ends[place] - len(file))] + self.first_samples[place]

    def by_source(self) -> dict[str, np.ndarray]:
        """The row numbers of each source."""
        rows: dict[str, list[np.ndarray]] = {name: [] for name in self.type_names}
        for file, end in zip(self.files, self.ends, strict=True):
            rows[self.type_names[file.type_id]].append(np.arange(end - len(file), end))
        return {name: np.concatenate([np.empty(0, np.int64), *parts]) for name, parts in rows.items()}


@dataclass(frozen=True, eq=False)
class ReferenceSums:
    """-log p of every answer of `rows` under the reference model of preference tuning."""

    rows: TrainRows | WholeSamples
    values: Tensor  # fp64 [samples], nan where it isn't known

    def of(self, number: int) -> Tensor:
        """Those of row `number`, fp64 [its samples]."""
        return self.values[torch.from_numpy(self.rows.samples_of(number))]
