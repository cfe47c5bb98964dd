"""Boxes: n-dimensional slices of global tensors, by which shards are named independently of any layout."""

from collections.abc import Iterator
from math import prod

Box = tuple[tuple[int, int], ...]  # (start, stop) per dim of the global tensor


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


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
