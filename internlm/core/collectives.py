"""Collectives in place, along one axis. A group of one sends nothing."""

import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

# torch 2.13 renamed both and warns at the old names, which torch 2.10 to 2.12 know alone.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def own_chunk(buffer: Tensor, group: Group) -> Tensor:
    """The part of a flat `buffer` [n * ranks] that belongs to this rank of `group`: a view [n]."""
    return buffer.chunk(group.size())[group.rank()]


def all_gather_(buffer: Tensor, group: Group) -> None:
    """Fills `buffer` [n * ranks] from every rank's own chunk of it."""
    if group.size() > 1:
        _all_gather(buffer, own_chunk(buffer, group), group=group)


def all_gather_into(buffer: Tensor, chunk: Tensor, group: Group) -> None:
    """Fills `buffer` [n * ranks] from every rank's `chunk` [n], which lies elsewhere."""
    _all_gather(buffer, chunk, group=group)


def reduce_scatter_(buffer: Tensor, group: Group) -> Tensor:
    """Sums `buffer` [n * ranks] over the ranks. Returns the own chunk [n], which holds its part of the sum."""
    chunk = own_chunk(buffer, group)
    if group.size() > 1:
        _reduce_scatter(chunk, buffer, group=group)
    return chunk


def all_reduce_(buffer: Tensor, group: Group) -> None:
    """Sums `buffer` over the ranks, in place."""
    if group.size() > 1:
        dist.all_reduce(buffer, group=group)
