"""The batch: one packed row of tokens, as the model takes it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

IGNORE_INDEX = -100


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


@dataclass(frozen=True)
class Batch:
    """One micro batch: a packed row. All tensors are [tokens]."""

    tokens: Tensor  # int64
    labels: Tensor  # int64, the next token; IGNORE_INDEX where nothing is trained
    positions: Tensor  # int64, place in the segment, for the rotary angles
    segments: Segments
    type_ids: Tensor | None = None  # int64, source of each token, for metrics
    num_trained: int = 0  # labels that are not IGNORE_INDEX, counted on the host

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """A copy on `device`; host-side counts stay as they are."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            tokens=move(self.tokens),
            labels=move(self.labels),
            positions=move(self.positions),
            segments=replace(self.segments, cu_seqlens=move(self.segments.cu_seqlens)),
            type_ids=None if self.type_ids is None else move(self.type_ids),
        )

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, as the loader's `pin_memory=True` calls it."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            positions=self.positions.pin_memory(),
            segments=replace(self.segments, cu_seqlens=self.segments.cu_seqlens.pin_memory()),
            type_ids=None if self.type_ids is None else self.type_ids.pin_memory(),
        )
