"""Units and their flat buffers: where each parameter lies.

A unit is what is gathered, reduced and updated at once: a transformer block, the embedding, the head. Where a module
mixes dtypes, frozen and trained parameters, or parameters that different ranks share, it has a unit for each. All
parameters of a unit lie in one flat buffer, so that a collective moves one piece of memory and nothing is copied in or
out.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import nn

from internlm.config.schema import Config
from internlm.core.mesh import Mesh
from internlm.core.placement import Placement, whole

# Which ranks share a unit's parameters. dense: those that hold the same part of the model; copied: the same, and every
# tensor rank has a copy; expert: those that hold the same experts.
Kind = Literal["dense", "copied", "expert"]
KINDS: tuple[Kind, ...] = ("dense", "copied", "expert")

ALIGNMENT = 64  # elements; views start at 128 bytes at least, which tensor cores and vector loads want


@dataclass(frozen=True)
class Slot:
    """A parameter's place in the flat buffer of its unit."""

    name: str
    shape: tuple[int, ...]  # of this rank's part of the global parameter
    start: int
    stop: int
    placement: Placement


@dataclass(frozen=True)
class UnitLayout:
    """The flat buffer of a unit. Slots with weight decay come first, so that one position separates them."""

    name: str
    kind: Kind
    dtype: torch.dtype
    slots: tuple[Slot, ...]
    size: int  # elements, padded so that every shard of every axis is aligned
    decay_stop: int  # weight decay applies to [0, decay_stop)
    modules: tuple[str, ...]  # whose forward uses it
    trainable: bool = True  # else it has parameters only: no gradients, no optimizer states
    packed: bool = False  # held in 4 bits between uses; frozen


def _num_shards(mesh: Mesh) -> dict[Kind, int]:
    """By kind, how many equal shards a buffer must divide into: the os of Hybrid ZeRO."""
    dense, expert = (
        prod(axes.sizes[axis] for axis in ("optim", "grad", "param")) for axes in (mesh.dense, mesh.expert)
    )
    return {"dense": dense, "copied": dense, "expert": expert}


def plan_units(
    model: nn.Module, config: Config, mesh: Mesh, placements: Mapping[str, Placement] | None = None
) -> list[UnitLayout]:
    """The units of a model, in the order of its forward pass.

    Args:
        model: its children are the units; a `ModuleList` stands for its members.
        placements: by name, of parameters that `parallel` has cut; the others are whole.
    """
    shards, tensor_size = _num_shards(mesh), mesh.sizes["tensor"]
    packed = config.lora.packed if config.lora else ()
    modules: list[str] = []
    for name, child in model.named_children():
        modules += [f"{name}.{i}" for i in range(len(child))] if isinstance(child, nn.ModuleList) else [name]
    units = []
    for module in modules:
        tied = config.model.tie_word_embeddings and module == modules[0]  # the last module uses its parameters as well
        users = (module, modules[-1]) if tied else (module,)
        groups: dict[_Group, list[Slot]] = {}
        for inner, parameter in model.get_submodule(module).named_parameters():
            name, shape = f"{module}.{inner}", tuple(parameter.shape)
            placement = (placements or {}).get(name, whole(shape))
            in_4_bits = not parameter.requires_grad and any(fnmatch(name, pattern) for pattern in packed)
            dtype = str(parameter.dtype).removeprefix("torch.")
            group = _Group(parameter.requires_grad, in_4_bits, KINDS.index(_kind(placement, tensor_size)), dtype)
            groups.setdefault(group, []).append(Slot(name, shape, 0, prod(shape), placement))
        for group in sorted(groups):
            name, kind, dtype = module + group.suffix(groups), KINDS[group.kind], getattr(torch, group.dtype)
            layout = _layout(name, kind, dtype, groups[group], shards[kind], config.adam.no_decay, users)
            units.append(replace(layout, trainable=group.trainable, packed=group.packed))
    return units


class _Group(NamedTuple):
    """What the parameters of a unit have in common. A module's units are sorted by these fields."""

    trainable: bool
    packed: bool
    kind: int  # its place in KINDS
    dtype: str

    def suffix(self, groups: Collection["_Group"]) -> str:
        """What distinguishes the unit's name from those of the other `groups` of its module."""
        parts = []
        if len({group.dtype for group in groups}) > 1:
            parts.append(self.dtype)
        if len({group.kind for group in groups}) > 1 and KINDS[self.kind] != "dense":
            parts.append(KINDS[self.kind])
        if self.packed:
            parts.append("packed")
        elif not self.trainable and any(group.trainable for group in groups):
            parts.append("frozen")
        return "".join(f":{part}" for part in parts)


def _kind(placement: Placement, tensor_size: int) -> Kind:
    if placement.axis == "expert":
        return "expert"
    return "dense" if placement.axis == "tensor" or tensor_size == 1 else "copied"


def _layout(
    label: str,
    kind: Kind,
    dtype: torch.dtype,
    parameters: Sequence[Slot],
    num_shards: int,
    no_decay: Sequence[str],
    users: tuple[str, ...],
) -> UnitLayout:
    """Places `parameters` one after another, those with weight decay first."""
    undecayed = {slot.name for slot in parameters if any(fnmatch(slot.name, pattern) for pattern in no_decay)}
    slots, end, decay_stop = [], 0, 0
    for slot in sorted(parameters, key=lambda slot: slot.name in undecayed):
        start, stop = end, end + prod(slot.shape)
        slots.append(replace(slot, start=start, stop=stop))
        end = _round_up(stop, ALIGNMENT)
        if slot.name not in undecayed:
            decay_stop = end
    return UnitLayout(label, kind, dtype, tuple(slots), _round_up(end, num_shards * ALIGNMENT), decay_stop, users)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
