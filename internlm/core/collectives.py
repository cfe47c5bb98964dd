"""Collectives along one axis; the group is an argument.

Functions with a name that ends in _ work in place and do nothing in a group of one. Those that return `Sent` come back
before the transfer is done, and like the rest need a group of several ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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


class Sent(NamedTuple):
    """A collective on its way on the group's own stream; compute may go on until it needs the result."""

    result: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The result, once compute may read it."""
        if self.work is not None:
            self.work.wait()
        return self.result


def all_gather(x: Tensor, group: Group) -> Sent:
    """Every rank's x [n, ...] one after the other: [n * ranks, ...], in new memory."""
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    return Sent(whole, _all_gather(whole, x.contiguous(), group=group, async_op=True))


def reduce_scatter(x: Tensor, group: Group) -> Sent:
    """The sum of every rank's x [n * ranks, ...], of which this rank gets its part [n, ...], in new memory."""
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return Sent(part, _reduce_scatter(part, x.contiguous(), group=group, async_op=True))


def all_reduce(x: Tensor, group: Group) -> Sent:
    """The sum of every rank's x, in new memory."""
    total = x.clone(memory_format=torch.contiguous_format)
    return Sent(total, dist.all_reduce(total, group=group, async_op=True))


class Exchange:
    """A differentiable all-to-all of equal parts under way: x [ranks, ...] -> [ranks, ...], where part i of the result
    is rank i's part for this rank. Compute may go on until it calls `wait`.

    The gradient takes the same way back and overlaps as well: in backward it is sent where `wait` was called, and
    waited for where the exchange began.
    """

    def __init__(self, x: Tensor, group: Group) -> None:
        self._way = _Way(group)
        self._x: Tensor = _Begin.apply(x, self._way)

    def wait(self) -> Tensor:
        """The result. To be called once."""
        return _End.apply(self._x, self._way)  # type: ignore[no-untyped-call]


class _Way:
    """The transfer of an exchange, forward or backward. Autograd's graph holds it, so it must not hold the graph."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.work: dist.Work | None = None

    def begin(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.work = dist.all_to_all_single(received, x.contiguous(), group=self.group, async_op=True)
        return received

    def end(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.work = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.begin(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.way.end()
        return grad, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        way.end()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way.begin(grad), None


def shift(outgoing: Tensor | None, incoming: Tensor | None, distance: int, group: Group) -> Callable[[], Tensor | None]:
    """Starts to send `outgoing` to the rank `distance` places after this one in the ring, and to receive `incoming`
    from the one `distance` places before it. None: nothing is sent that way, and the other rank knows it.

    Returns a function that waits for both and returns `incoming`. NCCL wants all ranks in the first transfer of a
    group, so the group must have been used before.
    """
    rank, ranks = group.rank(), group.size()
    sides = (dist.isend, outgoing, rank + distance), (dist.irecv, incoming, rank - distance)
    ops = [dist.P2POp(op, x, group=group, group_peer=peer % ranks) for op, x, peer in sides if x is not None]
    works = dist.batch_isend_irecv(ops) if ops else []

    def wait() -> Tensor | None:
        for work in works:
            work.wait()
        ops.clear()  # until here the memory that is sent has been kept
        return incoming

    return wait


def add_other_end_(buffer: Tensor, group: Group) -> None:
    """Sums `buffer` over the first and the last rank, in place. Called by these two, which get identical sums."""
    other = group.size() - 1 if group.rank() == 0 else 0
    theirs = torch.empty_like(buffer)
    transfers = [
        dist.P2POp(dist.isend, buffer, group=group, group_peer=other),
        dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    buffer.add_(theirs)


def all_to_all(x: Tensor, group: Group, sends: list[int] | None = None, receives: list[int] | None = None) -> Tensor:
    """Sends rows of x [n, ...] to other ranks, `sends[r]` of them to rank r, in order.

    Returns the rows that arrive, `receives[r]` from rank r, in order of r. Without both, all parts are equal.
    """
    received = x.new_empty(x.shape[0] if receives is None else sum(receives), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receives, sends, group=group)
    return received
