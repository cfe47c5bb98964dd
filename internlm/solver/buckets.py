"""Units and their flat buffers: who lies where.

A unit is what is gathered, reduced and updated at once: a transformer block, the embedding, the head; one unit per
dtype where a module mixes dtypes. All parameters of a unit lie in one flat buffer, so that a collective moves one piece
of memory and nothing is copied in or out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod

import torch
from torch import nn

ALIGNMENT = 64  # elements; views start at 128 bytes at least, which tensor cores and vector loads want


@dataclass(frozen=True)
class Slot:
    """A parameter's place in the flat buffer of its unit."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class UnitLayout:
    """The flat buffer of a unit. Slots with weight decay come first, so that a single position parts the two kinds."""

    name: str
    dtype: torch.dtype
    slots: tuple[Slot, ...]
    size: int  # elements, padded so that every shard of every axis is aligned
    decay_stop: int  # weight decay applies to [0, decay_stop)
    modules: tuple[str, ...]  # whose forward uses it


def plan_units(model: nn.Module, num_shards: int, no_decay: Sequence[str], shared: bool) -> list[UnitLayout]:
    """The units of a model, in the order of its forward pass.

    Args:
        model: its children are the units; a `ModuleList` stands for its members.
        num_shards: into how many equal parts a buffer must divide (the os of Hybrid ZeRO).
        no_decay: patterns of parameter names without weight decay.
        shared: the last module uses the first one's parameters as well (tied embeddings).
    """
    modules: list[str] = []
    for name, child in model.named_children():
        modules += [f"{name}.{i}" for i in range(len(child))] if isinstance(child, nn.ModuleList) else [name]
    units = []
    for module in modules:
        parameters = {
            f"{module}.{name}": parameter for name, parameter in model.get_submodule(module).named_parameters()
        }
        users = (module, modules[-1]) if shared and module == modules[0] else (module,)
        dtypes = sorted({parameter.dtype for parameter in parameters.values()}, key=str)
        for dtype in dtypes:
            shapes = {name: tuple(p.shape) for name, p in parameters.items() if p.dtype == dtype}
            label = module if len(dtypes) == 1 else f"{module}:{str(dtype).removeprefix('torch.')}"
            units.append(_layout(label, dtype, shapes, num_shards, no_decay, users))
    return units


def _layout(
    label: str,
    dtype: torch.dtype,
    shapes: dict[str, tuple[int, ...]],
    num_shards: int,
    no_decay: Sequence[str],
    users: tuple[str, ...],
) -> UnitLayout:
    undecayed = {name for name in shapes if any(fnmatch(name, pattern) for pattern in no_decay)}
    slots, end, decay_stop = [], 0, 0
    for name in sorted(shapes, key=lambda name: name in undecayed):
        start, stop = end, end + prod(shapes[name])
        slots.append(Slot(name, shapes[name], start, stop))
        end = _round_up(stop, ALIGNMENT)
        if name not in undecayed:
            decay_stop = end
    return UnitLayout(label, dtype, tuple(slots), _round_up(end, num_shards * ALIGNMENT), decay_stop, users)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
