"""The batch: one packed row of tokens, as the model takes it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from internlm.ops.cross_entropy import IGNORE_INDEX
from internlm.ops.segments import Segments

__all__ = ["IGNORE_INDEX", "Batch", "Segments"]


@dataclass(frozen=True)
class Batch:
    """One micro batch: a packed row. All tensors but `reference` are [tokens]."""

    tokens: Tensor  # int64
    labels: Tensor  # int64, the next token; IGNORE_INDEX where nothing is trained
    positions: Tensor  # int64, place in the segment, for the rotary angles
    segments: Segments
    type_ids: Tensor | None = None  # int64, source of each token, for metrics
    num_trained: int = 0  # labels that are not IGNORE_INDEX, counted on the host
    reference: Tensor | None = None  # fp64 [samples], -log p of each answer under the reference (dpo.reference)

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
            reference=None if self.reference is None else move(self.reference),
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
