"""Data that needs no file: the 2023 dummy set and random tokens for benchmarks."""

import numpy as np

from internlm.data.formats import Int64s, SampleFile


class DummyFile(SampleFile):
    """The 2023 framework's data without a train_folder: sample i is [n, r] and then 0..n-1, r times over.

    n is in 1..29 and r in 10..199, so a model soon learns it; ids stay below 200 and sample length is cut to `seq_len`.
    """

    name = "dummy_path/dummy_lang/dummy_ds/train.bin"

    def __init__(self, seq_len: int, num_samples: int = 1_000_000) -> None:
        random = np.random.RandomState(1999)
        self.numbers = random.randint(1, 30, size=num_samples).astype(np.int64)
        self.repeats = random.randint(10, 200, size=num_samples).astype(np.int64)
        self.lengths = np.minimum(2 + self.numbers * self.repeats, seq_len)

    def tokens(self, index: int) -> Int64s:
        number, repeats = self.numbers[index], self.repeats[index]
        sample = np.concatenate(([number, repeats], np.tile(np.arange(number), repeats)))
        return sample[: self.lengths[index]]


class SyntheticFile(SampleFile):
    """Uniformly random ids in 1..vocab_size-1, `length` a sample; sample i depends on (seed, i) only."""

    def __init__(self, length: int, vocab_size: int, seed: int, num_samples: int = 2**20) -> None:
        self.name = f"synthetic (seed {seed})"
        self.vocab_size = vocab_size
        self.seed = seed
        self.lengths = np.full(num_samples, length, np.int64)

    def tokens(self, index: int) -> Int64s:
        random = np.random.Generator(np.random.Philox(key=[self.seed % 2**63, index]))
        return random.integers(1, self.vocab_size, int(self.lengths[index]), dtype=np.int64)
