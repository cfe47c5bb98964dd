"""Which tokens of a packed row belong together."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which tokens of a packed row attend to each other.

    `lengths` stays on the host so that no kernel launch ever waits for the device.
    """

    cu_seqlens: Tensor  # int32 [segments + 1], starts with 0, ends with the number of tokens
    lengths: tuple[int, ...]  # tokens of each segment

    @staticmethod
    def of(lengths: tuple[int, ...]) -> "Segments":
        """Segments of the given lengths, on the CPU."""
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Segments(ends, tuple(lengths))

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1
