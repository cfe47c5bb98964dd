"""Which tokens of a packed row belong together."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Segments:
    """Which tokens of a packed row attend to each other.

    `lengths` stays on the host so that no kernel launch ever waits for the device. A compiled block reads only the
    other fields: each Python number that it reads becomes part of the compiled code, and these hardly ever change.
    (Not frozen: the compiler would look into every field of a frozen dataclass.)
    """

    cu_seqlens: Tensor  # int32 [segments + 1], starts with 0, ends with the number of tokens
    lengths: tuple[int, ...]  # tokens of each segment
    extent: Tensor = field(init=False)  # int64 [2] on the host: number of segments, length of the longest
    num_equal: int = field(init=False)  # number of segments if all have the same length, else 0

    def __post_init__(self) -> None:
        self.extent = torch.tensor((len(self.lengths), max(self.lengths)))
        self.num_equal = len(self.lengths) if self.uniform else 0

    @staticmethod
    def of(lengths: tuple[int, ...]) -> "Segments":
        """Segments of the given lengths, on the CPU."""
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Segments(ends, tuple(lengths))

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1
