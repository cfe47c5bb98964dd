"""Pieces: what a rank updates, as boxes of global tensors, so that a checkpoint doesn't depend on the layout."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from internlm.core.collectives import all_gather_into
from internlm.core.mesh import MODEL_AXES, Mesh
from internlm.core.placement import Box, Placement, box_shape, boxes_of_interval, shifted
from internlm.solver.buckets import Slot
from internlm.solver.unit import Unit


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor that this rank holds, for checkpoints."""

    name: str
    kind: str  # "param" | "master" | "exp_avg" | "exp_avg_sq"
    global_shape: tuple[int, ...]
    box: Box
    owner: bool  # False on copies: they load it and don't save it
    read: Callable[[], Tensor]  # -> tensor of the box's shape, on the device
    write: Callable[[Tensor], None]


def pieces_of(unit: Unit, slot: Slot) -> Iterator[Piece]:
    """The pieces of one parameter that lie in the owned part of its unit."""
    start, stop = unit.owned_start, unit.owned_start + unit.owned.numel()
    low, high = max(slot.start, start), min(slot.stop, stop)
    if low >= high:
        return
    buffers = {"param": unit.owned}
    if unit.layout.trainable:
        buffers |= {"exp_avg": unit.exp_avg, "exp_avg_sq": unit.exp_avg_sq}
    for part_box, first, last in boxes_of_interval(slot.shape, low - slot.start, high - slot.start):
        place, shape = (first + slot.start - start, last + slot.start - start), box_shape(part_box)
        box, whole = shifted(part_box, slot.placement.box), slot.placement.shape
        for kind, buffer in buffers.items():
            if unit.nf4 is not None:
                yield Piece(slot.name, kind, whole, box, unit.counts, partial(_unpacked, unit, place, shape), _refuse)
                continue
            part = buffer[slice(*place)].view(shape)
            yield Piece(slot.name, kind, whole, box, unit.counts, partial(_identity, part), partial(_copy_to, part))
        if unit.layout.trainable and unit.layout.dtype != torch.float32:
            read, write = partial(_read_master, unit, place, shape), partial(_write_master, unit, place)
            yield Piece(slot.name, "master", whole, box, unit.counts, read, write)


def joined(placement: Placement, part: Tensor, mesh: Mesh) -> Tensor:
    """The global parameter from the parts of the axis along which it is cut. Collective."""
    if placement.axis is None or mesh.sizes[placement.axis] == 1:
        return part
    dim = next(d for d, (start, stop) in enumerate(placement.box) if stop - start < placement.shape[d])
    group = mesh.group(placement.axis)
    parts = part.new_empty(group.size() * part.numel())
    all_gather_into(parts, part.flatten(), group)
    return torch.cat([chunk.view_as(part) for chunk in parts.chunk(group.size())], dim)


def pieces_of_buffers(buffers: Mapping[str, Tensor], mesh: Mesh) -> Iterator[Piece]:
    """One whole piece for each buffer of the model; the first rank of a stage saves them."""
    owner = not any(mesh.coordinates[axis] for axis in MODEL_AXES if axis != "pipeline")
    for name, buffer in buffers.items():
        shape = tuple(buffer.shape)
        whole = tuple((0, size) for size in shape)
        yield Piece(name, "param", shape, whole, owner, partial(_identity, buffer), partial(_copy_to, buffer))


def _unpacked(unit: Unit, place: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    return unit.read_owned()[slice(*place)].view(shape)


def _refuse(value: Tensor) -> None:
    raise AssertionError("weights in 4 bits are loaded once, before they are packed")


def _read_master(unit: Unit, place: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    return unit.read_master(*place).view(shape)


def _write_master(unit: Unit, place: tuple[int, int], value: Tensor) -> None:
    unit.write_master(*place, value.to(unit.owned.device, torch.float32).reshape(-1))


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _copy_to(target: Tensor, value: Tensor) -> None:
    target.copy_(value)
