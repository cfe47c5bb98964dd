"""Small agreements between ranks, over gloo: they never touch the GPU, nor the order of the engine's collectives."""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Control:
    """All ranks of the default process group. Making one is collective, and so is every method."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")
        self.rank = self.group.rank()
        self.size = self.group.size()

    def maximum(self, numbers: list[int]) -> list[int]:
        """The largest of each number over all ranks."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def from_first(self, value: T) -> T:
        """Rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values
