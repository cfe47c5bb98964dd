"""Boxes: n-dimensional slices of global tensors, by which shards are named independently of any layout; and
placements: which box of a parameter a rank's model holds, and who holds copies of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

Box = tuple[tuple[int, int], ...]  # (start, stop) per dim of the global tensor


@dataclass(frozen=True)
class Placement:
    """How a parameter lies on the ranks of one set of replicas, before Hybrid ZeRO shares it out.

    A parameter that is not cut has copies on all tensor ranks. Their gradients are summed: each comes from a part of
    the tokens or of the heads. Where every tensor rank computes the whole gradient, `grad_scale` is 1 / tensor ranks.
    """

    shape: tuple[int, ...]  # of the global tensor
    box: Box  # what this rank's model holds of it
    axis: Literal["tensor", "expert"] | None = None  # along which it is cut
    grad_scale: float = 1.0  # factor of the gradient before copies are summed
    at_both_ends: bool = False  # first and last stage of the pipeline have copies, each with a part of the gradient


def whole(shape: tuple[int, ...], grad_scale: float = 1.0) -> Placement:
    """The placement of a parameter that is not cut."""
    return Placement(shape, tuple((0, size) for size in shape), grad_scale=grad_scale)


def cut(shape: tuple[int, ...], dim: int, rank: int, ranks: int, axis: Literal["tensor", "expert"]) -> Placement:
    """The placement of a parameter cut along `dim` into `ranks` equal parts, of which this rank holds number `rank`."""
    assert shape[dim] % ranks == 0, (shape, dim, ranks)
    part = shape[dim] // ranks
    box = [(0, size) for size in shape]
    box[dim] = (rank * part, (rank + 1) * part)
    return Placement(shape, tuple(box), axis)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def shifted(box: Box, origin: Box) -> Box:
    """A box given relative to the corner of `origin`, in global coordinates."""
    return tuple((start + first, stop + first) for (start, stop), (first, _) in zip(box, origin, strict=True))


def boxes_of_interval(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[Box, int, int]]:
    """Cuts the flat interval [start, stop) of a row-major tensor into boxes.

    Returns (box, flat start, flat stop) in ascending order; each box is contiguous in the flat order. A tensor of n
    dims needs at most 2 n - 1 boxes: the torn first rows, the whole rows, the torn last rows, of each dim.
    """
    assert 0 <= start <= stop <= prod(shape), (shape, start, stop)
    return [(box, low, high) for box, low, high in _cut(shape, start, stop, 0) if low < high]


def _cut(shape: tuple[int, ...], start: int, stop: int, offset: int) -> Iterator[tuple[Box, int, int]]:
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (((start, stop),) if shape else ()), offset + start, offset + stop
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are [first, last)
    if first > last:  # inside one row
        yield from _rows(shape, last, start - last * row, stop - last * row, offset)
        return
    if start < first * row:
        yield from _rows(shape, first - 1, start - (first - 1) * row, row, offset)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:])), offset + first * row, offset + last * row
    if last * row < stop:
        yield from _rows(shape, last, 0, stop - last * row, offset)


def _rows(shape: tuple[int, ...], index: int, start: int, stop: int, offset: int) -> Iterator[tuple[Box, int, int]]:
    row = prod(shape[1:])
    for box, low, high in _cut(shape[1:], start, stop, offset + index * row):
        yield ((index, index + 1), *box), low, high
